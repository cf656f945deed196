"""``ca2cl encoders list``: registered encoders with their best scores."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ca2cl.common.tables import fitted, iso, short, when
from ca2cl.config import TrackingConfig
from ca2cl.registry.downstream import Downstream, best, downstream_runs, runs_of
from ca2cl.registry.register import INPUT_SIZE_TAG
from ca2cl.registry.versions import EncoderVersion, existing_store, registered
from ca2cl.store.open import Store, find_run, resolve_uri

POSITIONAL: tuple[str, ...] = ()
_HEADS = ("name", "version", "aliases", "arch", "step", "px", "views", "data", "source run", "created (UTC)")


@dataclass(frozen=True, kw_only=True)
class ListConfig:
    """List the registered encoders, newest first.

    "best NAME" is the best value of that metric in any finished downstream run, with its kind, full name and test data.
    These values may come from different test data; ``ca2cl encoders compare`` separates them.
    """

    name: str | None = None
    """Registered model to list; none lists every encoder that ca2cl registered."""
    metrics: tuple[str, ...] = ("accuracy", "AP")
    """Downstream metrics whose best values are shown: full names, or the ends of names, such as 100pct/macro_f1."""
    json: bool = False
    """Print a JSON list with all fields."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow store of the encoders."""


def run(config: ListConfig) -> int:
    """Print the table or the JSON. Returns the exit code.

    Raises:
        InputError: the store cannot be reached.
    """
    store = existing_store(config.tracking)
    records = list_encoders(store, config.name, config.metrics) if store else []
    if config.json:
        sys.stdout.write(json.dumps(records, indent=1) + "\n")
    elif records:
        sys.stdout.write(_table(records, config.metrics))
    else:
        sys.stdout.write(_nothing(config, store))
    return 0


def list_encoders(store: Store, name: str | None, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """A record of every registered encoder, newest first, ready for JSON."""
    versions = registered(store, name)
    grouped = downstream_runs(store) if versions else {}
    return [_record(store, entry, runs_of(entry, grouped), metrics) for entry in versions]


def _record(store: Store, entry: EncoderVersion, runs: Sequence[Downstream], metrics: Sequence[str]) -> dict[str, Any]:
    source = find_run(store, entry.run_id)
    params = source.data.params if source else {}
    kind = source.data.tags.get("ca2cl.kind") if source else None
    size, step = entry.tag(INPUT_SIZE_TAG) or params.get("data.image_size"), entry.tag("ca2cl.step")
    return {
        "name": entry.name,
        "version": int(entry.version),
        "aliases": list(entry.aliases),
        "arch": entry.tag("ca2cl.arch"),
        "step": int(step) if step else None,
        "input_size": int(size) if size else None,
        "views_recipe": params.get("views.recipe", kind),
        "manifest_digest": entry.tag("ca2cl.manifest_digest"),
        "source_run_id": entry.run_id,
        "created": iso(entry.created),
        "created_ms": entry.created,
        "downstream_runs": len(runs),
        "best": {name: _best(runs, name) for name in metrics},
    }


def _best(runs: Sequence[Downstream], wanted: str) -> dict[str, Any] | None:
    found = best(runs, wanted)
    if found is None:
        return None
    value, name, run = found
    terms = run.terms
    return {
        "value": value,
        "metric": name,
        "kind": terms.kind,
        "test_manifest_digest": terms.test,
        "run_id": run.run_id,
    }


def _table(records: Sequence[dict[str, Any]], metrics: Sequence[str]) -> str:
    shown = [name for name in metrics if any(record["best"][name] for record in records)]
    rows = [
        [
            record["name"],
            str(record["version"]),
            ", ".join(record["aliases"]) or "-",
            *(str(record[key]) if record[key] is not None else "-" for key in ("arch", "step", "input_size")),
            record["views_recipe"] or "-",
            short(record["manifest_digest"]),
            short(record["source_run_id"]),
            when(record["created_ms"]),
            *(_shown(record["best"][name]) for name in shown),
        ]
        for record in records
    ]
    return fitted([*_HEADS, *(f"best {name}" for name in shown)], rows)


def _shown(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    where = found["metric"].removeprefix("encoder/").rpartition("/")[0]
    kind = f"{found['kind']} {where}".strip()
    return f"{found['value']:.4f} ({kind}, test {short(found['test_manifest_digest'])})"


def _nothing(config: ListConfig, store: Store | None) -> str:
    _, root = resolve_uri(config.tracking.uri, config.tracking.root)
    where = store.public_uri if store else f"{root} (there is no store yet)"
    what = f"no encoder is registered as {config.name}" if config.name else "no encoder is registered"
    return (
        f"{what} in {where}.\n"
        "`ca2cl pretrain --recipe NAME --data.shards SHARDS --run.output_dir DIR` trains\nand registers one, "
        "`ca2cl encoders import timm:NAME.TAG`,\n`... import hf-hub:ORG/NAME` or `... import FILE` registers public "
        "weights;\n--tracking.uri and --tracking.root look in another store.\n"
    )
