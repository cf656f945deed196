"""``ca2cl doctor``: checks of the machine, a job and a launch."""
