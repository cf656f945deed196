"""Compact result table, and what it shows in one sentence."""
