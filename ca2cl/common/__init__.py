"""Helpers for every package: files, job directories, records, tables."""
