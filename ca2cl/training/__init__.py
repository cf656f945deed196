"""The loop, its engines, checkpoints and optimizers."""
