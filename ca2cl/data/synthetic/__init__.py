"""Synthetic tissue tiles for the quickstart and the tests."""
