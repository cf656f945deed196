"""Scores and pictures of a detector's predictions."""
