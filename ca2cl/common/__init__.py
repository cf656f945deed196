"""Helpers that every package may import: files, job directories, records, tables. Imports no torch."""
