"""Annotations of slides: which tiles they keep, and of which class."""
