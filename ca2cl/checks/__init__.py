"""What ``ca2cl doctor`` looks at: the machine, a job's arithmetic and rates, the ranks of a launch."""
