"""Batched image operations that the view recipes are made of."""
