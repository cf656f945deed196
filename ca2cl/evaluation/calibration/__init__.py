"""Calibration of class probabilities: errors, temperature scaling, reliability diagrams."""
