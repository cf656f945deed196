-- Beside the runs (POSTGRES_DB, "mlflow"): users and their rights have tables, and a history of migrations, of their own.
CREATE DATABASE mlflow_auth;
