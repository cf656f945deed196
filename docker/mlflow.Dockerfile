# Tracking server of compose.yaml: MLflow with its dependencies for users (Flask-WTF), PostgreSQL and S3.
FROM docker.io/library/python:3.11-slim-bookworm
RUN pip install --no-cache-dir --disable-pip-version-check \
    "mlflow[auth]==3.17.2" "psycopg2-binary==2.9.13" "boto3==1.43.117"
COPY mlflow-server.sh mlflow-auth.ini /opt/mlflow/
RUN useradd --create-home --uid 1000 mlflow
USER 1000
WORKDIR /home/mlflow
ENV PYTHONUNBUFFERED=1
EXPOSE 5000
ENTRYPOINT ["/bin/sh", "/opt/mlflow/mlflow-server.sh"]
