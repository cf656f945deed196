"""Report of a fine-tuning job: table, differences, JSON, MLflow run, registered classifier."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ca2cl import __version__
from ca2cl.common.console.summary import closing
from ca2cl.common.files import write_atomic, writing
from ca2cl.common.grid import AGAIN, RESULT, Grid
from ca2cl.common.records import read_fields
from ca2cl.config import flatten
from ca2cl.data.fingerprints.seen import merged, write_seen
from ca2cl.data.fingerprints.survey import see
from ca2cl.errors import InputError
from ca2cl.evaluation import report as shared
from ca2cl.evaluation.compare import Comparison, compare_with_first, differences
from ca2cl.evaluation.datasets import describe_missing, missing_classes, name_sets, units_of
from ca2cl.evaluation.finetune.best_checkpoint import KEPT, keep_best
from ca2cl.evaluation.finetune.trial import PREDICTIONS, Trial, TuningJob
from ca2cl.evaluation.leaks.wording import lines as leak_lines
from ca2cl.evaluation.result import ENCODER, Row, score_row
from ca2cl.evaluation.statistics import Units
from ca2cl.evaluation.tables.calibrations import calibration_table, draw_calibration
from ca2cl.evaluation.tables.recalls import recall_table
from ca2cl.evaluation.verdict.screen import DETAILS, files_text, in_bold, summarize
from ca2cl.registry.register import log_and_register
from ca2cl.registry.resolve import ResolvedEncoder
from ca2cl.store.locate import store_flag
from ca2cl.store.notes import short_name
from ca2cl.store.open import open_store, store_errors, store_place

CLASSIFIERS = {"all": "fine-tuned", "head": "linear head"}
"""Names of the rows by what was trained."""
RECORD = "finetune.json"
"""Record of the job, in its folder."""
RESULTS = "finetune-results.json"
LOGGED = "logged.json"
"""Record of the MLflow run that the job's results were logged as."""
SCHEMA_VERSION = 1
_OF_ROWS = ("labelled", "best_epoch", "steps")


def report(job: TuningJob, found: ResolvedEncoder, grid: Grid[Trial], drawn_by: str) -> None:
    """Print and write what all trials together say, and log it.

    Args:
        job: what the trials share.
        found: the encoder.
        grid: trials and their results.
        drawn_by: what labels were drawn by, in words.

    Raises:
        InputError: a trial's files are damaged; the store cannot be reached.
    """
    config, index, out = job.config, job.test.index, Path(job.config.output_dir)
    if not (out / RESULTS).exists():  # what an earlier start finished stays as it is
        _keep_seen(job, found, (path.parent for path in grid.values()))
    groups: dict[tuple[str, float], list[Path]] = {}
    for trial, path in grid.items():
        groups.setdefault((trial.start, trial.budget), []).append(path.parent)
    # a tile that did not decode is in no trial
    units = units_of(index, _predictions(next(iter(grid.values())).parent)["samples"].tolist(), "test")
    rows = [_row(CLASSIFIERS[config.trains], *key, folders, units) for key, folders in groups.items()]
    compared = compare_with_first(rows)
    missing, (test,) = missing_classes(index.labels(), index.classes), name_sets([config.test])
    leak = read_fields(out / RECORD, ("leak",), AGAIN)["leak"]
    summary = summarize(
        rows, {test: units}, compared, {test: leak_lines(leak)}, statement=job.protocol.statement,
        remarks=[*leak_lines(leak), describe_missing(missing)],
    )  # fmt: skip
    details = _details(job, rows, compared, f"labelled tiles drawn by {drawn_by}\n{units.statement}\n")
    sys.stdout.write(f"{details}\n" if config.details else "")
    sys.stdout.write(summary.text(bold=in_bold()))
    files = [out / RESULTS, out / f"{Path(RESULTS).stem}{DETAILS}"]
    content = _content(job, found, rows, compared)
    content |= {
        "verdict": summary.verdicts[test].as_dict(),
        "leak": leak,
        "cells": [read_fields(path, _OF_ROWS, AGAIN) for path in grid.values()],
        "drawn_by": drawn_by,
        "missing_classes": missing,
        "resampled": units.as_dict(),
    }
    shared.write_json(files[0], content)
    write_atomic(files[1], f"{summary.text()}\n{details}".encode(), shared.REMEDY)
    files += _pictures(out, rows, index.classes)
    sys.stdout.write(f"\n{files_text(files)}")
    sys.stdout.flush()
    metrics = shared.tracked_metrics(rows, shared.metric_names(config.against), compared)
    protocol = config.note_protocol or config.protocol
    run_id, before = shared.log_results(
        config, found, metrics, files, name=config.tracking.run_name or f"finetune of {short_name(found.uri)}",
        sets=[(config.train, job.train.index.manifest, "training"), (config.test, index.manifest, "testing")],
        shown=summary.tables(), verdict=" ".join(summary.sentences), digests=job.digests, leak=leak,
        tags={"ca2cl.kind": "finetune", "ca2cl.protocol": protocol, "ca2cl.resampled_by": units.name},
        params={"drawn_by": drawn_by}, logged=out / LOGGED,
    )  # fmt: skip
    place = store_place(config.tracking.uri, config.tracking.root)
    sys.stdout.write(f"logged as MLflow run {run_id} in {place}{' already' if before else ''}\n")
    kept = _keep_classifier(job, found, run_id, (path.parent for path in grid.values()))
    use = ["ca2cl", "heatmap", out, "SLIDES", "--mpp", "0.5", "--out", "maps"]
    sys.stdout.write(
        kept
        + closing(
            "fine-tuned encoders",
            out,
            *([use] if kept else []),
            ["ca2cl", "ui", *store_flag(config.tracking.uri, config.tracking.root)],
        )
    )


def _details(job: TuningJob, rows: Sequence[Row], compared: Sequence[Comparison], how: str) -> str:
    """The long tables: every metric, differences, recalls, calibration."""
    by_slides = any(name is not None for name in job.train.index.groups())
    text = shared.table(rows) + differences(ENCODER, compared, name_classifiers=False)
    text += recall_table(rows, job.test.index.classes) + calibration_table(rows, [ENCODER], by_slides)
    return f"{text}\n{shared.describe_draws(job.config.seeds)}; {how}"


def _pictures(out: Path, rows: Sequence[Row], classes: Sequence[str]) -> list[Path]:
    """Confusion matrix and reliability diagram of the encoder with the most labels."""
    shown = [row for row in rows if row.features == ENCODER][-1]
    title = f"{shown.classifier} from {shown.features}, {shown.labelled} labelled tiles"
    confusion, reliability = out / "confusion.png", out / "reliability.png"
    shared.draw_confusion(confusion, shown.confusion, classes, f"{title}: % of each label", shown.recalls)
    drawn = draw_calibration(reliability, shown, f"{title}: reliability")
    return [confusion, *([reliability] if drawn else [])]


def _keep_seen(job: TuningJob, found: ResolvedEncoder, folders: Iterable[Path]) -> None:
    """Write beside the best classifier which tiles it was trained on."""
    classifier = keep_best([*folders])
    if classifier is not None:
        labelled = see(job.train.index, job.train.reader, workers=job.config.workers, title="training tiles")
        with writing(classifier, KEPT):
            write_seen(classifier, merged([found.seen, labelled]))


def _keep_classifier(job: TuningJob, found: ResolvedEncoder, run_id: str, folders: Iterable[Path]) -> str:
    """Keep and register the best classifier; the line about it, empty where there is none."""
    tracking = job.config.tracking
    classifier = keep_best([*folders])
    if classifier is None:
        return ""
    text = f"the best classifier on held-out tiles is in {classifier}"
    if not tracking.register_as:
        return f"{text}\n"
    store = open_store(tracking.uri, tracking.root)
    with store_errors(store.uri):
        version = log_and_register(run_id, classifier, tracking.register_as, store)
    return f"{text},\nregistered as models:/{tracking.register_as}/{version}\n"


def _predictions(folder: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        return load_file(folder / PREDICTIONS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder}: damaged ({error}); delete that folder and start again") from None


def _row(classifier: str, start: str, budget: float, folders: Sequence[Path], units: Units) -> Row:
    predictions = [_predictions(folder) for folder in folders]
    results = [read_fields(folder / RESULT, _OF_ROWS, AGAIN) for folder in folders]
    probabilities = [found["probabilities"] for found in predictions]
    settings = [{"best_epoch": result["best_epoch"], "steps": result["steps"]} for result in results]
    labels_M = predictions[0]["labels"]
    temperatures = [result.get("temperature") for result in results]  # cells of earlier versions have none
    return score_row(
        start, classifier, budget, results[0]["labelled"], labels_M, probabilities, settings, units,
        temperatures=temperatures,
    )  # fmt: skip


def _content(
    job: TuningJob, found: ResolvedEncoder, rows: Sequence[Row], compared: Sequence[Comparison]
) -> dict[str, Any]:  # fmt: skip
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "finetune",
        "ca2cl": __version__,
        "encoder": found.describe(),
        "data": {"train_manifest_digest": job.digests[0], "test_manifest_digest": job.digests[1]},
        "protocol": {"name": job.config.protocol, "statement": job.protocol.statement},
        "classes": job.test.index.classes,
        "config": flatten(job.config),
        "results": [shared.row_as_dict(row) for row in rows],
        "differences": [{"against": c.against, "budget": c.budget, **asdict(c.difference)} for c in compared],
    }
