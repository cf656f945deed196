"""Encoder, heads, BatchNorm, preprocessing and encoder files."""
