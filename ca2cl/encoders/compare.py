"""``ca2cl encoders compare``: downstream metrics of encoders side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ca2cl.common.tables import fitted
from ca2cl.config import TrackingConfig
from ca2cl.errors import InputError, nearest
from ca2cl.registry.downstream import Downstream, Terms, is_named, newest_by_terms, runs_for, spellings
from ca2cl.registry.versions import EncoderVersion, find_version, needed_store

POSITIONAL = ("encoders",)
# What may differ between two runs without changing what their metrics mean: which encoder, where things lie, how fast.
_NEUTRAL = (
    "encoder",
    "encoder_uri",
    "train",
    "test",
    "labels",
    "output",
    "batch_size",
    "workers",
    "device",
    "cache_dir",
    "floors",
    "imagenet",
    "against",
    "classifiers",
    "tokens",  # of the terms
    "draw_by",  # drawn_by says what it came to
)

_CHANCE = "note: these are means; `ca2cl probe --encoder A --against B` says which differences are more than chance\n"

Column = tuple[str, Mapping[Terms, Downstream]]


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compare the downstream metrics of two or more encoders.

    For each kind of run, the newest runs of the encoders on the same training and test shards (by manifest digest) are
    compared, metric by metric. The label budget is part of a metric's name. Other runs are listed as not comparable.
    """

    encoders: tuple[str, ...]
    """Two or more encoders: version number, alias, models:/NAME/VERSION, models:/NAME@ALIAS, or run id."""
    name: str | None = None
    """Registered model of bare numbers and aliases; none: ca2cl-encoder, or the only other model that has them."""
    metric: str | None = None
    """Metric to compare: a full name or the end of names, such as macro_f1 or linear/100pct/accuracy; none: all."""
    json: bool = False
    """Print a JSON list of groups."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow store of the encoders."""

    def __post_init__(self) -> None:
        if len(self.encoders) < 2:
            raise InputError(f"encoders is {', '.join(self.encoders) or 'empty'}: give two or more to compare")


def run(config: CompareConfig) -> int:
    """Print a table for every group of comparable runs. Returns the exit code, 0 also where nothing is comparable.

    Raises:
        InputError: an unknown encoder, one that is given twice, or a metric that none has.
    """
    store = needed_store(config.tracking)
    entries = [find_version(store, what, config.name) for what in config.encoders]
    _check_distinct(entries, config.encoders)
    columns: list[Column] = [(entry.label, newest_by_terms(runs_for(store, entry))) for entry in entries]
    if config.metric is not None:
        _check_metric(columns, config.metric)
    shared, alone = _groups(columns)
    if config.json:
        sys.stdout.write(json.dumps([_as_dict(terms, columns, config.metric) for terms in shared], indent=1) + "\n")
        return 0
    for terms in shared:
        sys.stdout.write(f"{terms}\n{_table(terms, columns, config.metric)}{_difference(terms, columns)}\n")
    sys.stdout.write(_CHANCE if shared else "")
    sys.stdout.write(_not_comparable(columns, alone, bool(shared)))
    return 0


def _check_distinct(entries: Sequence[EncoderVersion], given: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for entry, what in zip(entries, given, strict=True):
        if entry.uri in seen:
            raise InputError(f"encoders: {seen[entry.uri]} and {what} are both {entry.label}; give two different ones")
        seen[entry.uri] = what


def _check_metric(columns: Sequence[Column], wanted: str) -> None:
    known = spellings(name for _, newest in columns for run in newest.values() for name in run.scores())
    if known and wanted not in known:
        raise InputError(f"metric is {wanted!r}: none of their downstream runs has it; {nearest(wanted, known)}")


def _groups(columns: Sequence[Column]) -> tuple[list[Terms], dict[Terms, str]]:
    """Terms that two encoders or more were measured on, and the rest with the one encoder that was."""
    holders: dict[Terms, list[str]] = {}
    for label, newest in columns:
        for terms in newest:
            holders.setdefault(terms, []).append(label)
    order = sorted(holders, key=str)
    return (
        [terms for terms in order if len(holders[terms]) > 1],
        {terms: holders[terms][0] for terms in order if len(holders[terms]) == 1},
    )


def _metrics(terms: Terms, columns: Sequence[Column], wanted: str | None) -> list[str]:
    names = {name for _, newest in columns if terms in newest for name in newest[terms].scores()}
    return sorted(name for name in names if wanted is None or is_named(name, wanted))


def _table(terms: Terms, columns: Sequence[Column], wanted: str | None) -> str:
    rows = [
        [name, *(newest[terms].shown(name) if terms in newest else "-" for _, newest in columns)]
        for name in _metrics(terms, columns, wanted)
    ]
    return fitted(["metric", *(label for label, _ in columns)], rows)


def _difference(terms: Terms, columns: Sequence[Column]) -> str:
    """A warning for every setting that was not the same in all of the runs."""
    runs = [(label, newest[terms]) for label, newest in columns if terms in newest]
    names = sorted({name for _, run in runs for name in run.params})
    lines = []
    for name in names:
        if name in _NEUTRAL or name.startswith("tracking."):
            continue
        values = [run.params.get(name) for _, run in runs]
        if len(set(values)) > 1:
            values_text = ", ".join(f"{label} {value}" for (label, _), value in zip(runs, values, strict=True))
            lines.append(f"note: {name} was not the same: {values_text}\n")
    return "".join(lines)


def _not_comparable(columns: Sequence[Column], alone: Mapping[Terms, str], any_shared: bool) -> str:
    lines = (
        [] if any_shared else ["nothing is comparable: no two of them were measured the same way on the same shards"]
    )
    lines += [f"not comparable: {terms}: only {label} has it" for terms, label in alone.items()]
    lines += [f"{label} has no downstream run" for label, newest in columns if not newest]
    return "".join(f"{line}\n" for line in lines)


def _as_dict(terms: Terms, columns: Sequence[Column], wanted: str | None) -> dict[str, Any]:
    runs = {label: newest[terms] for label, newest in columns if terms in newest}
    return {
        **terms.as_dict(),
        "runs": {label: run.run_id for label, run in runs.items()},
        "metrics": {
            name: {label: run.metrics[name] for label, run in runs.items() if name in run.metrics}
            for name in _metrics(terms, columns, wanted)
        },
    }
