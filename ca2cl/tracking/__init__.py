"""The journal of a run, MLflow's mirror of it, and the registry of encoders. The only part that imports mlflow."""
