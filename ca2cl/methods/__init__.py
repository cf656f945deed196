"""Self-supervised methods. No engine, no files, no MLflow."""
