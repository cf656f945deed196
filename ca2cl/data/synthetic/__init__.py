"""Synthetic tissue tiles and gland images for the quickstart and the tests."""
