"""Tiles: sources, shards, remote reads, loading order and decoding."""
