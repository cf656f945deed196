"""Shards as dataset inputs of an MLflow run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ca2cl.common.redact import redact
from ca2cl.store.open import Store

_DIGEST = 36
"""Characters that MLflow keeps of a digest."""
_CONTEXT = "mlflow.data.context"


def describe_input(shards: str, manifest: Mapping[str, Any], context: str) -> dict[str, Any]:
    """A data set that a run used, for JSON.

    Args:
        shards: folder or URL.
        manifest: of the shards.
        context: what it was used for: training or testing.
    """
    kept = ("digest", "samples", "shards", "bytes", "classes", "counts", "tile_size", "source")
    return {"location": redact(shards), "context": context, **{name: manifest.get(name) for name in kept}}


def log_inputs(store: Store, run_id: str, inputs: Sequence[Mapping[str, Any]]) -> None:
    """Log data sets that ``describe_input`` described as inputs of a run; those that it has already are left."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    entries = []
    for one in inputs:
        location = str(one["location"])
        profile = {"num_rows": one["samples"], **{name: one[name] for name in ("classes", "counts", "tile_size")}}
        data = Dataset(
            name=location.rstrip("/").rpartition("/")[2] or "shards",
            digest=str(one["digest"])[:_DIGEST],
            source_type="ca2cl shards",
            source=json.dumps({"uri": location, "made_from": one["source"], "manifest_digest": one["digest"]}),
            profile=json.dumps(profile),
        )
        entries.append(DatasetInput(data, [InputTag(_CONTEXT, str(one["context"]))]))
    store.client.log_inputs(run_id, datasets=entries)
