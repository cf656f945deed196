"""Body, feature pyramid and optimizer of a detector, for every engine."""
