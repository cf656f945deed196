"""Render views on a CPU, compiled by Numba."""
