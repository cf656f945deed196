"""Overlap of a test set with training tiles."""
