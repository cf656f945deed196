"""Overlap of a test set with the tiles that a result was trained on."""
