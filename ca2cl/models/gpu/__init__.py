"""Normalise groups of rows on a GPU by Triton kernels."""
