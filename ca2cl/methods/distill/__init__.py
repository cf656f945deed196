"""Distillation of a frozen encoder's features into another encoder (docs/mathematics.md)"""
