"""Report of a fine-tuning job: table, differences, JSON, MLflow run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ca2cl import __version__
from ca2cl.common.grid import AGAIN, RESULT, Grid
from ca2cl.common.records import read_fields
from ca2cl.config import flatten
from ca2cl.errors import InputError
from ca2cl.evaluation.compare import describe_difference, under_heading
from ca2cl.evaluation.datasets import describe_missing, missing_classes
from ca2cl.evaluation.finetune.best_checkpoint import keep_best
from ca2cl.evaluation.finetune.config import FinetuneConfig
from ca2cl.evaluation.finetune.log import log_once, register
from ca2cl.evaluation.finetune.original import protocol_of
from ca2cl.evaluation.finetune.step import LabelledSet
from ca2cl.evaluation.finetune.trial import PREDICTIONS, Trial
from ca2cl.evaluation.leakage import lines as leak_lines
from ca2cl.evaluation.leakage import tag as leak_tag
from ca2cl.evaluation.metrics import classification_metrics
from ca2cl.evaluation.report import draw_confusion, row_as_dict, table, write_json
from ca2cl.evaluation.result import Row
from ca2cl.evaluation.splits import known_slides
from ca2cl.evaluation.statistics import Difference, Units, bootstrap_interval, holm, paired_difference
from ca2cl.registry.resolve import ResolvedEncoder

CLASSIFIERS = {"all": "fine-tuned", "head": "linear head"}
"""Names of the rows by what was trained."""
RECORD = "finetune.json"
"""What a job's folder is the folder of."""
SCHEMA_VERSION = 1
_OF_ROWS = ("labelled", "best_epoch", "steps")
Groups = dict[tuple[str, float], list[Path]]


def report(
    config: FinetuneConfig, found: ResolvedEncoder, grid: Grid[Trial], test: LabelledSet,
    digests: Sequence[str], drawn_by: str,
) -> None:  # fmt: skip
    """Print and write what all trials together say, and log it.

    Args:
        config: the job's settings.
        found: the encoder.
        grid: trials and their results.
        test: the test tiles.
        digests: manifests of train and test.
        drawn_by: what labels were drawn by, in words.

    Raises:
        InputError: a trial's files are damaged; the store cannot be reached.
    """
    groups: Groups = {}
    for trial, path in grid.items():
        groups.setdefault((trial.start, trial.budget), []).append(path.parent)
    right = {key: np.stack([_right(folder) for folder in folders]) for key, folders in groups.items()}
    units = _units(next(iter(groups.values()))[0], test)
    name = CLASSIFIERS[config.trains]
    rows = [_row(name, *key, folders, right[key], units) for key, folders in groups.items()]
    first, out = next(iter(grid)).start, Path(config.output_dir)
    compared = {
        (start, budget): paired_difference(right[first, budget], right[start, budget], units)
        for start, budget in groups
        if start != first
    }
    compared = dict(zip(compared, holm(list(compared.values())), strict=True))
    missing = missing_classes(test.index.labels(), test.index.classes)
    leak = read_fields(out / RECORD, ("leak",), AGAIN)["leak"]
    sys.stdout.write(table(rows) + _differences(first, compared))
    sys.stdout.write("".join(f"\n{line}\n" for line in (*leak_lines(leak), describe_missing(missing)) if line))
    files = [out / "finetune-results.json", out / "confusion.png"]
    content = _content(config, found, rows, compared, groups, digests)
    write_json(
        files[0],
        {
            **content,
            "classes": test.index.classes,
            "drawn_by": drawn_by,
            "missing_classes": missing,
            "resampled": units.as_dict(),
        },
    )
    shown = [row for row in rows if row.features == first][-1]
    title = f"{name} from {shown.features}, {shown.labelled} labelled tiles: % of each label"
    draw_confusion(files[1], shown.confusion, test.index.classes, title)
    statement = protocol_of(config).statement
    sys.stdout.write(f"\nlabelled tiles drawn by {drawn_by}\n{units.statement}\n")
    sys.stdout.write(f"mean ± sd over {config.seeds} seeds; written to {files[0]} and {files[1]}\n")
    sys.stdout.write(f"{statement}\n" if statement else "")
    sys.stdout.flush()
    tags = {"ca2cl.resampled_by": units.name, **leak_tag(leak, first)}
    run_id, before = log_once(config, found, rows, compared, files, digests, drawn_by, tags)
    sys.stdout.write(f"logged as MLflow run {run_id}{' already' if before else ''}\n")
    _tell_classifier(config, run_id, keep_best([folder for folders in groups.values() for folder in folders]))


def _tell_classifier(config: FinetuneConfig, run_id: str, classifier: Path | None) -> None:
    if classifier is not None:
        address = register(config, run_id, classifier)
        text = f"the best classifier on held-out tiles is in {classifier}"
        sys.stdout.write(f"{text}, registered as {address}\n" if address else f"{text}\n")


def _right(folder: Path) -> npt.NDArray[np.bool_]:
    held = _predictions(folder)
    return np.asarray(held["probabilities"].argmax(axis=1) == held["labels"], bool)


def _predictions(folder: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        return load_file(folder / PREDICTIONS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder}: damaged ({error}); delete that folder and start again") from None


def _units(folder: Path, test: LabelledSet) -> Units:
    """What the test tiles are resampled by; a tile that did not decode is in no trial."""
    groups, samples_M = test.index.groups(), _predictions(folder)["samples"]
    return Units.of(known_slides([groups[sample] for sample in samples_M.tolist()], "test"), len(samples_M))


def _row(
    classifier: str, start: str, budget: float, folders: Sequence[Path], right_SN: npt.NDArray[np.bool_], units: Units
) -> Row:  # fmt: skip
    held = [_predictions(folder) for folder in folders]
    results = [read_fields(folder / RESULT, _OF_ROWS, AGAIN) for folder in folders]
    return Row(
        features=start,
        classifier=classifier,
        budget=budget,
        labelled=results[0]["labelled"],
        per_seed=[classification_metrics(h["labels"], h["probabilities"]) for h in held],
        settings=[{"best_epoch": result["best_epoch"], "steps": result["steps"]} for result in results],
        interval=bootstrap_interval(right_SN, units),
    )


def _differences(first: str, compared: dict[tuple[str, float], Difference]) -> str:
    lines = [describe_difference(first, start, "", budget, d) for (start, budget), d in compared.items()]
    return under_heading(lines)


def _content(
    config: FinetuneConfig, found: ResolvedEncoder, rows: Sequence[Row],
    compared: dict[tuple[str, float], Difference], groups: Groups, digests: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    cells = [read_fields(folder / RESULT, _OF_ROWS, AGAIN) for folders in groups.values() for folder in folders]
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "finetune",
        "ca2cl": __version__,
        "encoder": {"uri": found.uri, "source_run_id": found.source_run_id, "card": asdict(found.card)},
        "data": {"train_manifest_digest": digests[0], "test_manifest_digest": digests[1]},
        "protocol": {"name": config.protocol, "statement": protocol_of(config).statement},
        "leak": read_fields(Path(config.output_dir) / RECORD, ("leak",), AGAIN)["leak"],
        "config": flatten(config),
        "results": [row_as_dict(row) for row in rows],
        "differences": [
            {"against": start, "budget": budget, **asdict(d)} for (start, budget), d in compared.items()
        ],
        "cells": cells,
    }  # fmt: skip
