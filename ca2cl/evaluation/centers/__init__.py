"""Robustness of frozen features to medical centres, scanners, stains and compression."""
