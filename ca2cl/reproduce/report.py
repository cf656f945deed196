"""Report of a reproduction: table, JSON, chart, MLflow run."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ca2cl import __version__
from ca2cl.common.console.summary import closing
from ca2cl.common.files import write_atomic
from ca2cl.common.records import read_fields
from ca2cl.config import flatten
from ca2cl.evaluation import report as shared
from ca2cl.evaluation.leaks.pretraining import trained_on
from ca2cl.evaluation.result import ENCODER, Row
from ca2cl.evaluation.tables.calibrations import calibration_table
from ca2cl.evaluation.tables.recalls import recall_table
from ca2cl.registry.resolve import ResolvedEncoder
from ca2cl.reproduce.config import JOBS, KEPT, TASKS, NctConfig, jobs
from ca2cl.reproduce.data_summary import open_sets
from ca2cl.reproduce.datasets import made_up
from ca2cl.reproduce.linear import linear_grid, read_rows
from ca2cl.reproduce.published_results import FOUNDATION
from ca2cl.reproduce.table import Line, draw_chart, lines, notes, table
from ca2cl.store.locate import store_flag
from ca2cl.store.notes import short_name
from ca2cl.store.open import store_place

RESULTS = "reproduce-results.json"
TUNED = "finetune-results.json"
"""Of a job of ``ca2cl finetune``."""
_CHART, _TEXT, _LOGGED = "reproduce.png", "reproduce.txt", "logged.json"
SCHEMA_VERSION = 1
KIND = "reproduce-nct"


def report(config: NctConfig, found: ResolvedEncoder, facts: Mapping[str, Any]) -> None:
    """Print and write what all cells together say, and log it once.

    Raises:
        InputError: a cell's file is damaged, a file cannot be written, or the store cannot be reached.
    """
    config = replace(config, tasks=_finished(config))
    leak = {**facts["leak"], "trained_on_test": trained_on({ENCODER: found}, facts["digests"][1])}
    facts = {**facts, "leak": leak, "arch": found.card.arch, "image_size": config.image_size or found.card.input_size}
    shown = lines(_rows(config))
    remarks = notes(config, facts, made_up(Path(config.data)))
    rows = [line.ours for line in shown]
    more = recall_table(rows, facts["classes"])
    more += calibration_table(rows, [ENCODER], facts.get("train_slides_known", True))
    text = table(shown) + more + "\n" + "\n".join(remarks) + "\n"
    sys.stdout.write(text)
    files = [config.out / name for name in (RESULTS, _CHART, _TEXT)]
    shared.write_json(files[0], _content(config, found, facts, shown, remarks))
    title = f"{config.encoder}, labels of {config.train_set}, protocol {config.protocol}"
    write_atomic(files[1], draw_chart(shown, title), KEPT)
    write_atomic(files[2], text.encode(), KEPT)
    sys.stdout.write(f"\n{shared.describe_draws(config.seeds or 1)}; written to {', '.join(map(str, files))}\n")
    sys.stdout.flush()
    sys.stdout.write(_log_once(config, found, facts, shown, files))


def _finished(config: NctConfig) -> tuple[str, ...]:
    """This start's tasks and those that an earlier start has finished: it must not take their rows away."""
    tuned = {trains: (config.out / folder / TUNED).exists() for trains, folder in JOBS.items()}
    there = {"linear": tuned["head"] or not linear_grid(config).missing(), "finetune": tuned["all"]}
    return tuple(task for task in TASKS if task in config.tasks or there[task])


def _rows(config: NctConfig) -> list[Row]:
    tuned = jobs(config)
    rows = read_rows(config) if "linear" in config.tasks and "head" not in tuned else []
    for trains in tuned:
        results = read_fields(config.out / JOBS[trains] / TUNED, ("results",), "delete it and start again")["results"]
        rows += [shared.row_from_dict(held) for held in results]
    return rows


def _content(
    config: NctConfig, found: ResolvedEncoder, facts: Mapping[str, Any], shown: Sequence[Line], remarks: Sequence[str]
) -> dict[str, Any]:  # fmt: skip
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "ca2cl": __version__,
        "encoder": found.describe(),
        "data": dict(facts),
        "classes": facts["classes"],
        "leak": facts["leak"],
        "resampled": facts.get("resampled"),
        "config": flatten(config),
        "results": [line.as_dict() for line in shown],
        "foundation_models": FOUNDATION,
        "notes": list(remarks),
    }


def protocol_tag(config: NctConfig) -> str:
    """Protocol tag of the MLflow runs: numbers of drawn tiles must rank no encoder, and only those of the
    honest protocol do."""
    return "made-up tissue" if made_up(Path(config.data)) else config.protocol


def _metrics(shown: Sequence[Line]) -> dict[str, float]:
    rows = [line.ours for line in shown]
    names = shared.metric_names(list(dict.fromkeys(row.features for row in rows if row.features != ENCODER)))
    flat = shared.tracked_metrics(rows, names)
    for line in shown:
        if line.theirs is not None and line.ours.features == ENCODER:
            name = shared.metric_name("theirs", line.ours.classifier, line.ours.budget)
            flat[f"{name}/accuracy"], flat[f"{name}/macro_f1"] = line.theirs.accuracy, line.theirs.macro_f1
    return flat


def _log_once(
    config: NctConfig, found: ResolvedEncoder, facts: Mapping[str, Any], shown: Sequence[Line], files: Sequence[Path]
) -> str:  # fmt: skip
    """Log the run, unless these results were logged by a start before this one; what to say of it."""
    tags = {
        "ca2cl.kind": KIND,
        "ca2cl.protocol": protocol_tag(config),
        "ca2cl.resampled_by": facts.get("resampled", {}).get("unit", "tile"),
    }
    run_id, before = shared.log_results(
        config, found, _metrics(shown), files,
        name=config.tracking.run_name or f"reproduce nct with {short_name(found.uri)}",
        sets=[
            (str(config.shards(name)), index.manifest, context)
            for name, index, context in zip(config.sets, open_sets(config), ("training", "testing"), strict=True)
        ],
        shown=table(shown),
        digests=facts["digests"], leak=facts["leak"], tags=tags, params={}, logged=config.out / _LOGGED,
    )  # fmt: skip
    place = store_place(config.tracking.uri, config.tracking.root)
    told = f"logged as MLflow run {run_id} in {place}{' already' if before else ''}\n"
    return told + closing(
        "the authors' tables, yours beside theirs",
        config.out,
        ["ca2cl", "ui", *store_flag(config.tracking.uri, config.tracking.root)],
    )
