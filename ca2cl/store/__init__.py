"""An MLflow store: opening it, its artifacts and the names it accepts."""
