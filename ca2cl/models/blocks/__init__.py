"""Layers and blocks of an encoder: their numbers, drop path, recomputed activations."""
