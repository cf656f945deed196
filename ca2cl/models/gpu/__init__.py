"""Normalise groups of rows on a GPU: Triton kernels, each an operator of torch."""
