"""Encoders as files that other programs load, one module a target; each file is tried before it is put in place."""
