"""Memory of a pre-training step: estimated, and compared with what there is."""
