"""Everything that a job imports, and what it works out once a process: ``tests.support.forked`` forks after this."""

import gc
import importlib
import io

import torch
from matplotlib.figure import Figure

from ca2cl.api.two_views import Views
from ca2cl.cli.parser import parse
from ca2cl.tracking.environment import requirements
from tests.support.migrated import copy_migrated_stores

MODULES = (
    "ca2cl.pretrain.run", "ca2cl.evaluation.finetune.run", "ca2cl.evaluation.probe.run", "ca2cl.evaluation.embed.run",
    "ca2cl.methods.ca2cl.method", "ca2cl.data.loading.stream", "ca2cl.methods.ca2cl.cluster_figure",
    "accelerate.commands.launch", "torch.distributed.run", "torch._dynamo", "pytest",
    "ca2cl.registry.serving", "alembic.command", "mlflow.pyfunc", "sqlalchemy.dialects.sqlite",
    "mlflow.store.artifact.local_artifact_repo", "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store", "sklearn.linear_model", "sklearn.metrics",
    "sklearn.model_selection", "sklearn.neighbors", "sklearn.preprocessing", "PIL.PngImagePlugin", "pyarrow.parquet",
)  # fmt: skip
for name in MODULES:
    importlib.import_module(name)
parse("pretrain", ["--recipe", "smoke", "--data.shards", "none"])
Figure().savefig(io.BytesIO())  # reads the fonts
torch.set_num_threads(1)  # threads are none of a forked process's
for recipe in ("crop", "ca2cl"):  # loads their compiled loops; in a new checkout, compiles them
    Views(recipe, 32)(torch.zeros(16, 48, 48, 3, dtype=torch.uint8), [str(key) for key in range(16)])
requirements()
copy_migrated_stores()
gc.collect()
gc.freeze()  # collections in forked processes leave these pages alone, which stay shared
