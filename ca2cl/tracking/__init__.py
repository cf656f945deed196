"""A run's journal and its mirror in MLflow."""
