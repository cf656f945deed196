"""Render views on a GPU: Triton kernels, each an operator of torch."""
