"""Encoder, heads, normalisation."""
