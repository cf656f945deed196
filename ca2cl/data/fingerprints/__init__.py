"""Fingerprints of tiles, by which copies and altered copies are found."""
