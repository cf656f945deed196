"""``ca2cl doctor``: checks of the machine, of a job's data and of a launch."""
