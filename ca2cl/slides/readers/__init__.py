"""Readers of slide formats behind one interface."""
