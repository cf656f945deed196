"""Grid of linear classifiers by label budget and seed.

Legend: N labelled tiles, M test tiles, D features.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ca2cl.common.console.progress import ProgressBar
from ca2cl.common.files import write_atomic, writing
from ca2cl.common.grid import Grid
from ca2cl.common.records import parse_json, read_fields
from ca2cl.errors import InputError
from ca2cl.evaluation.metrics import ClassificationMetrics, classification_metrics
from ca2cl.evaluation.probe.scoring import LINEAR, SGD, Scoring, classify
from ca2cl.evaluation.protocol import PROTOCOLS
from ca2cl.evaluation.result import ENCODER, Row, score_row
from ca2cl.evaluation.splits import budget_name, draw_subsets
from ca2cl.evaluation.statistics import Units, bootstrap_interval
from ca2cl.reproduce.config import KEPT, NctConfig
from ca2cl.reproduce.vectors import Vectors

logger = logging.getLogger(__name__)
CLASSIFIERS = (SGD, LINEAR)
"""By SGD, and by L-BFGS with a fixed strength, which has nothing to choose; both on frozen features. The authors' own
linear probe is a job of ``ca2cl finetune``, by protocol original."""
SLIDES = "linear/test-slides.json"
"""The slide or patient of every test tile that was scored; null where none is known."""
PREDICTIONS = ".safetensors"
"""Suffix of the file beside a trial's with the test tiles' probabilities and labels."""


class LinearTrial(NamedTuple):
    """Classifier, label budget, and number of the draw."""

    classifier: str
    budget: float
    seed: int

    @property
    def name(self) -> str:
        """Name of the trial's file."""
        classifier = self.classifier.replace(" ", "-")
        return f"{classifier}-{budget_name(self.budget)}-seed{self.seed}"


def linear_grid(config: NctConfig) -> Grid[LinearTrial]:
    """The trials, in the table's order."""
    assert config.seeds is not None
    budgets = sorted(set(config.labels), key=lambda budget: (budget > 1, budget))
    trials = itertools.starmap(LinearTrial, itertools.product(CLASSIFIERS, budgets, range(config.seeds)))
    return Grid((trial, config.out / "linear" / f"{trial.name}.json") for trial in trials)


def run_trials(config: NctConfig, trials: Sequence[LinearTrial], train: Vectors, test: Vectors, shown: bool) -> None:
    """Fit and score these trials.

    Args:
        shown: whether a progress bar is.

    Raises:
        InputError: a file cannot be written.
    """
    with writing(config.out, KEPT):
        (config.out / "linear").mkdir(exist_ok=True)
    write_atomic(config.out / SLIDES, (json.dumps(test.slides) + "\n").encode(), KEPT)
    grid = linear_grid(config)
    for trial in ProgressBar(trials, desc="linear cells", unit="cell", disable=not shown):
        result = _run(trial, grid, config, train, test)
        write_atomic(grid[trial], (json.dumps(result) + "\n").encode(), KEPT)
        logger.info("%s: accuracy %.4f, macro F1 %.4f", trial.name, result["scores"]["accuracy"],
                    result["scores"]["macro_f1"])  # fmt: skip


def _run(
    trial: LinearTrial, grid: Grid[LinearTrial], config: NctConfig, train: Vectors, test: Vectors
) -> dict[str, Any]:
    protocol = PROTOCOLS[config.protocol]
    subsets = draw_subsets(
        train.labels_N, [trial.budget], trial.seed + 1, groups=train.slides, protocol=protocol
    )  # fmt: skip
    rows_N = subsets[trial.budget][trial.seed]
    first = trial._replace(seed=0)
    everything = len(rows_N) == len(train.labels_N) and not protocol.replacement
    predicted = grid[first].with_suffix(PREDICTIONS)
    if trial.classifier == LINEAR and everything and grid[first].exists() and predicted.exists():
        # the same tiles, and no randomness of its own
        write_atomic(grid[trial].with_suffix(PREDICTIONS), predicted.read_bytes(), KEPT)
        return {**_read(grid[first]), **trial._asdict()}
    # the slides of all tiles, as for the draw: one rule for all cells, whichever tiles a draw happens to hold
    how = Scoring(groups=train.slides, protocol=protocol, calibrate=True)
    prediction = classify(
        trial.classifier, train.values_ND, train.labels_N, rows_N, test.values_ND, test.labels_N, trial.seed, how
    )
    metrics = classification_metrics(test.labels_N, prediction.probabilities)
    arrays: dict[str, Any] = {"probabilities": prediction.probabilities.astype(np.float32), "labels": test.labels_N}
    write_atomic(grid[trial].with_suffix(PREDICTIONS), save(arrays), KEPT)
    return {
        **trial._asdict(),
        "labelled": len(rows_N),
        "setting": prediction.setting,
        "temperature": prediction.temperature,
        "scores": metrics.scores(),
        "confusion": metrics.confusion.tolist(),
        "right": "".join("01"[hit] for hit in (prediction.probabilities.argmax(axis=1) == test.labels_N).astype(int)),
    }


def _read(path: Path) -> dict[str, Any]:
    return read_fields(path, ("labelled", "setting", "scores", "confusion", "right"), "delete it and start again")


def read_units(out: Path) -> Units | None:
    """Units that the test tiles are resampled by; None in a folder of an earlier version, which did not write them.

    Raises:
        InputError: the file that says so is damaged.
    """
    path = out / SLIDES
    try:
        slides = parse_json(path.read_text(encoding="utf-8")) if path.exists() else None
        return None if slides is None else Units.of([str(slide) for slide in slides], len(slides))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error!r}); delete {path.parent} and start again") from None


def read_rows(config: NctConfig) -> list[Row]:
    """The linear trials' rows of the table, over seeds.

    Raises:
        InputError: a trial's file is missing or damaged.
    """
    grid, units = linear_grid(config), read_units(config.out)
    groups = itertools.groupby(grid, key=lambda trial: (trial.classifier, trial.budget))
    return [
        _row(classifier, budget, [grid[trial] for trial in trials], units) for (classifier, budget), trials in groups
    ]


def _row(classifier: str, budget: float, paths: Sequence[Path], units: Units | None) -> Row:
    results = [_read(path) for path in paths]
    settings = [result["setting"] for result in results]
    predicted = [path.with_suffix(PREDICTIONS) for path in paths]
    if all(path.exists() for path in predicted):
        arrays = [_predictions(path) for path in predicted]
        return score_row(
            ENCODER, classifier, budget, results[0]["labelled"], arrays[0]["labels"],
            [found["probabilities"] for found in arrays], settings, units,
            temperatures=[result.get("temperature") for result in results],
        )  # fmt: skip
    right_SM = np.array([[mark == "1" for mark in result["right"]] for result in results])
    return Row(  # of a folder of an earlier version, which did not keep probabilities
        features=ENCODER,
        classifier=classifier,
        budget=budget,
        labelled=results[0]["labelled"],
        per_seed=[
            ClassificationMetrics(**result["scores"], confusion=np.array(result["confusion"], np.int64))
            for result in results
        ],
        settings=settings,
        interval=bootstrap_interval(right_SM, units),
    )


def _predictions(path: Path) -> dict[str, Any]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        name = path.with_suffix(".json").name
        raise InputError(f"{path}: damaged ({error}); delete it and {name} and start again") from None
