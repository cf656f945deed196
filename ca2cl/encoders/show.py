"""``ca2cl encoders show``: one encoder's card, lineage and downstream runs."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ca2cl.common.scratch import scratch_folder
from ca2cl.common.tables import fitted, iso, when
from ca2cl.config import TrackingConfig
from ca2cl.errors import InputError
from ca2cl.models.encoder_card import CARD_NAME, ENCODER_PATH, EncoderCard, read_card
from ca2cl.registry.downstream import Downstream, runs_for
from ca2cl.registry.register import DIGEST_TAG
from ca2cl.registry.versions import EncoderVersion, find_version, needed_store
from ca2cl.store.artifacts import fetch, names_in, run_place, version_place
from ca2cl.store.open import Store, find_run

POSITIONAL = ("what",)


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """Show one encoder: its card, its lineage, and its downstream runs."""

    what: str
    """Version number, alias, models:/NAME/VERSION, models:/NAME@ALIAS, or id of the source run (or its first
    digits)."""
    name: str | None = None
    """Registered model of a bare number or alias; none: ca2cl-encoder, or the only other model that has it."""
    json: bool = False
    """Print a JSON object."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow store of the encoders."""


def run(config: ShowConfig) -> int:
    """Print the encoder. Returns the exit code.

    Raises:
        InputError: no such encoder, or the store cannot be reached.
    """
    store = needed_store(config.tracking)
    entry = find_version(store, config.what, config.name)
    record = describe(store, entry)
    runs = runs_for(store, entry)
    if config.json:
        record["downstream"] = [_as_dict(run) for run in runs]
        sys.stdout.write(json.dumps(record, indent=1) + "\n")
    else:
        sys.stdout.write(_text(entry, record) + _downstream(runs))
    return 0


def describe(store: Store, entry: EncoderVersion) -> dict[str, Any]:
    """Card and lineage of an encoder, ready for JSON.

    Raises:
        InputError: it has no card, or the store cannot be reached.
    """
    source = find_run(store, entry.run_id)
    tags, params = (source.data.tags, source.data.params) if source else ({}, {})
    card = fetch_card(store, entry)
    return {
        "uri": entry.uri,
        "name": entry.name or None,
        "version": int(entry.version) if entry.version else None,
        "aliases": list(entry.aliases),
        "created": iso(entry.created),
        "encoder_sha256": entry.tag(DIGEST_TAG) or tags.get(DIGEST_TAG),
        "card": dataclasses.asdict(card),
        "lineage": {
            "manifest_digest": card.manifest_digest,
            "config_digest": card.config_digest,
            "views_recipe": params.get("views.recipe"),
            "source_run_id": entry.run_id,
            "source_run_name": tags.get("mlflow.runName"),
            "source_run_kind": tags.get("ca2cl.kind", "pretrain"),
            "source_run_status": source.info.status if source else None,
            "commit": card.commit or tags.get("mlflow.source.git.commit"),
        },
    }


def fetch_card(store: Store, entry: EncoderVersion) -> EncoderCard:
    """The card alone, without the weights.

    Raises:
        InputError: there is none, or the store cannot be reached.
    """
    with scratch_folder() as scratch:
        return read_card(fetch(store, _card_place(store, entry), scratch))


def _card_place(store: Store, entry: EncoderVersion) -> str:
    if not entry.version:
        place = run_place(store, entry.run_id, ENCODER_PATH)
        if CARD_NAME not in names_in(store, place):
            raise InputError(f"run {entry.run_id!r}: has no encoder yet; let it finish, or give another run")
        return f"{place}/{CARD_NAME}"
    # the pyfunc keeps the encoder's folder under that folder's own name
    inside = f"{version_place(store, entry.name, entry.version)}/artifacts"
    folders = names_in(store, inside)
    if not folders:
        raise InputError(f"{entry.uri}: its artifacts are gone; register the encoder again")
    return f"{inside}/{folders[0]}/{CARD_NAME}"


def _as_dict(run: Downstream) -> dict[str, Any]:
    return {"run_id": run.run_id, **run.terms.as_dict(), "ended": iso(run.ended), "metrics": dict(run.metrics)}


def _text(entry: EncoderVersion, record: dict[str, Any]) -> str:
    card, lineage = record["card"], record["lineage"]
    status = lineage["source_run_status"] or "not in this store any more"
    lines = {
        "aliases": ", ".join(entry.aliases) or "none",
        "registered" if entry.version else "started": f"{when(entry.created)} UTC",
        "architecture": f"{card['arch']}, {card['feature_dim']} features, {card['input_size']} px",
        "pooling": card["pooling"] if card["pooling"] != "default" else None,
        "pixels": f"{card['mpp']:g} micrometres" if card["mpp"] else None,
        "mean, std": f"{_numbers(card['mean'])}; {_numbers(card['std'])}",
        "trained": f"{card['step']} steps{_last(card['metrics'])}" if card["step"] else "elsewhere",
        "moving average": card["weights"] if (card["weights"] or "last") != "last" else None,
        "classes seen": ", ".join(card["classes"]),
        "weights": f"sha256 {record['encoder_sha256']}",
        "started from": f"{card['start']} ({card['start_layout']}, {card['start_tensors']} tensors)"
        if card["start"]
        else None,
        "start's sha256": card["start_sha256"],
        "licence": card["licence"],
        "imported from": card["origin"],
        "of sha256": card["origin_sha256"],
        "trained by run": card["origin_run_id"],
        "tiles": f"manifest {lineage['manifest_digest']}" if lineage["manifest_digest"] else None,
        "configuration": f"digest {lineage['config_digest']}" if lineage["config_digest"] else None,
        "views": lineage["views_recipe"],
        "source run": f"{entry.run_id} ({lineage['source_run_name'] or lineage['source_run_kind']}, {status})",
        "git commit": lineage["commit"] or "not known",
    }
    width = max(map(len, lines))
    shown = [f"  {name:{width}}  {value}" for name, value in lines.items() if value]
    text = card["licence_text"]
    licence = [f"\nlicence of {card['start']}:", *(f"  {line}".rstrip() for line in text.splitlines())] if text else []
    return "\n".join([f"{entry.label} ({entry.uri})", *shown, *licence]) + "\n"


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _last(metrics: dict[str, float | None]) -> str:
    named = {name: value for name, value in metrics.items() if name in ("loss", "nt_xent", "cluster") and value}
    return "".join(f", last {name} {value:.4f}" for name, value in named.items())


def _downstream(runs: Sequence[Downstream]) -> str:
    if not runs:
        return "\nNo downstream run names it yet; `ca2cl probe --encoder ...` makes one.\n"
    parts = []
    for one in runs:
        title = f"\n{one.terms}: run {one.run_id}, {when(one.ended)} UTC\n"
        parts.append(title + fitted(("metric", "value"), [(name, one.shown(name)) for name in sorted(one.scores())]))
    return "".join(parts)
