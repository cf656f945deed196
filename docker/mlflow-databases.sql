-- A second database for users and permissions, with its own migrations. Runs are in POSTGRES_DB ("mlflow").
CREATE DATABASE mlflow_auth;
