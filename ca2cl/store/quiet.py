"""Import MLflow with a job's limits, and without its messages."""

from __future__ import annotations

import logging
import os

# MLflow's own patience (120 s a request, 7 retries with doubling pauses, and as long as a server's Retry-After says)
# would hide an outage for many minutes; the mirror retries by itself. A user's setting stays.
DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    "GIT_PYTHON_REFRESH": "quiet",
    # a training cluster does not phone home, and often cannot
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # stdout is for results: scripts read it
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_CHATTER = (
    "alembic",
    "urllib3.connectionpool",
    "mlflow.pyfunc",
    "mlflow.store.db.utils",
    "mlflow.utils.git_utils",
    "mlflow.tracking.context.git_context",
)


def quiet_mlflow() -> None:
    """Import MLflow with short HTTP limits, and without its messages about migrations and git."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401  its import configures logging, so levels are set after it

    for name in _CHATTER:
        logging.getLogger(name).setLevel(logging.ERROR)
