"""Data sets as inputs of an MLflow run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from ca2cl.common.redact import redact
from ca2cl.store.open import Store

_DIGEST = 12
"""Characters shown of a digest, as in ca2cl's own tables; the whole one is in the source."""
_CONTEXT = "mlflow.data.context"
_SHOWN_BY_SCHEME = {"": "local", "file": "local", "s3": "s3", "http": "http", "https": "http"}
"""Source types whose address MLflow's pages show; of any other they show the type alone."""
_COLUMNS = [
    {"type": "binary", "name": "image", "required": True},
    {"type": "string", "name": "class", "required": False},
]


def describe_input(shards: str, manifest: Mapping[str, Any], context: str) -> dict[str, Any]:
    """A data set that a run used, for JSON.

    Args:
        shards: folder or URL.
        manifest: of the shards; of other data sets, digest, samples, classes, counts and source under the same names,
            and a ``name``.
        context: what it was used for: training or testing.
    """
    kept = ("name", "digest", "samples", "shards", "bytes", "classes", "counts", "tile_size", "source")
    return {"location": redact(shards), "context": context, **{name: manifest.get(name) for name in kept}}


def log_inputs(store: Store, run_id: str, inputs: Sequence[Mapping[str, Any]]) -> None:
    """Log data sets that ``describe_input`` described as inputs of a run; those that it has already are left."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    entries = []
    for one in inputs:
        location = str(one["location"])
        scheme = urlsplit(location).scheme
        profile = {"num_rows": one["samples"], **{name: one[name] for name in ("classes", "counts", "tile_size")}}
        address = "url" if scheme in ("http", "https") else "uri"
        data = Dataset(
            name=one.get("name") or location.rstrip("/").rpartition("/")[2] or "shards",
            digest=str(one["digest"])[:_DIGEST],
            source_type=_SHOWN_BY_SCHEME.get(scheme, scheme),
            source=json.dumps({address: location, "made_from": one["source"], "manifest_digest": one["digest"]}),
            schema=json.dumps({"mlflow_colspec": _COLUMNS}) if one.get("shards") else None,
            profile=json.dumps(profile),
        )
        entries.append(DatasetInput(data, [InputTag(_CONTEXT, str(one["context"]))]))
    store.client.log_inputs(run_id, datasets=entries)
