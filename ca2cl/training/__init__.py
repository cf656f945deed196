"""The loop, its engines, checkpoints and optimizers. Knows a method only by its ``step``."""
