"""Result tables as text, JSON and confusion-matrix plots."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ca2cl.common.files import write_atomic, writing
from ca2cl.common.redact import redact_all
from ca2cl.common.tables import aligned
from ca2cl.config import flatten
from ca2cl.data.shards.index import Manifest
from ca2cl.evaluation.calibration.summary import Calibration
from ca2cl.evaluation.compare import Comparison
from ca2cl.evaluation.leaks.wording import tag as leak_tag
from ca2cl.evaluation.metrics import ClassificationMetrics, ClassRecall, mean_sd
from ca2cl.evaluation.result import ENCODER, Row
from ca2cl.evaluation.splits import describe_budget
from ca2cl.evaluation.statistics import Interval
from ca2cl.registry.evaluation_run import VERDICT_TAG, log_evaluation, log_evaluation_once
from ca2cl.registry.resolve import ResolvedEncoder
from ca2cl.store.inputs import describe_input
from ca2cl.store.notes import code_block

REMEDY = "free some space, or give a file in a folder you can write"
SCORES = tuple(f.name for f in dataclasses.fields(ClassificationMetrics) if f.name != "confusion")
_COLUMNS = {
    "accuracy": "top-1 accuracy",
    "balanced_accuracy": "balanced acc.",
    "macro_f1": "macro F1",
    "macro_auroc": "macro AUROC",
}


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text: mean ± sd over seeds, and the accuracy's 95 % interval.

    There is a column for the test set where there are several.
    """
    several = len({row.test for row in rows}) > 1
    return aligned(heads(several), [cells(row, several) for row in rows])


def heads(several: bool = False) -> list[str]:
    """Headings of the table's columns.

    Args:
        several: whether there is more than one test set.
    """
    where = ["test"] if several else []
    return ["features", "classifier", "labels", "tiles", *where, *_COLUMNS.values(), "95 % of top-1"]


def score_places(several: bool = False) -> dict[str, int]:
    """Scores by name, with the places of their columns under ``heads``."""
    return {score: 4 + several + place for place, score in enumerate(_COLUMNS)}


def cells(row: Row, several: bool = False) -> list[str]:
    """Cells of a row of the table, under ``heads``."""
    numbers = [plus_minus(*spread(row, score)) for score in _COLUMNS]
    interval = describe_interval(row.interval)
    what = [row.features, row.classifier, describe_budget(row.budget), str(row.labelled)]
    return [*what, *([row.test] if several else []), *numbers, interval]


def spread(row: Row, score: str) -> tuple[float, float]:
    """Mean and sd over seeds; no sd where all labels, and with them the same classifier, were drawn each time."""
    mean, sd = row.mean_sd(score)
    scores = [metrics.scores() for metrics in row.per_seed]
    return mean, math.nan if row.budget == 1 and all(one == scores[0] for one in scores) else sd


def describe_draws(seeds: int) -> str:
    """What ± is over."""
    return f"mean ± sd over {seeds} draws of labels" if seeds > 1 else "one draw of labels"


def describe_interval(interval: Interval) -> str:
    """Of an accuracy; one slide alone gives none."""
    return "one slide" if math.isnan(interval[0]) else f"[{interval[0]:.3f}, {interval[1]:.3f}]"


def plus_minus(mean: float, sd: float) -> str:
    """A score over seeds; one seed has no sd."""
    if math.isnan(mean):
        return "undefined"
    return f"{mean:.3f}" if math.isnan(sd) else f"{mean:.3f} ± {sd:.3f}"


def row_as_dict(row: Row) -> dict[str, Any]:
    """A row for JSON: mean and sd of every score, and every seed's scores, setting and confusion matrix."""
    scores = {name: row.mean_sd(name) for name in SCORES}
    return {
        "features": row.features,
        "classifier": row.classifier,
        "budget": row.budget,
        "labelled": row.labelled,
        "mean": {name: mean for name, (mean, _) in scores.items()},
        "sd": {name: sd for name, (_, sd) in scores.items()},
        "accuracy_interval_95": list(row.interval),
        "intervals_95": {name: list(interval) for name, interval in row.intervals.items()},
        "recalls": [dataclasses.asdict(one) for one in row.recalls],
        "calibration": row.calibration.as_dict() if row.calibration else None,
        "seeds": [
            {"seed": seed, **setting, **metrics.scores(), "confusion": metrics.confusion.tolist()}
            for seed, (metrics, setting) in enumerate(zip(row.per_seed, row.settings, strict=True))
        ],
    }


def row_from_dict(held: Mapping[str, Any], test: str = "") -> Row:
    """The row that ``row_as_dict`` wrote; a score that JSON has as null is ``nan`` again.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    per_seed, settings = [], []
    for seed in held["seeds"]:
        scores = {name: math.nan if seed[name] is None else float(seed[name]) for name in SCORES}
        per_seed.append(ClassificationMetrics(**scores, confusion=np.asarray(seed["confusion"], np.int64)))
        settings.append({name: value for name, value in seed.items() if name not in {*SCORES, "seed", "confusion"}})
    calibration = held.get("calibration")
    return Row(
        features=str(held["features"]),
        classifier=str(held["classifier"]),
        budget=float(held["budget"]),
        labelled=int(held["labelled"]),
        per_seed=per_seed,
        settings=settings,
        interval=_interval(held["accuracy_interval_95"]),
        test=test,
        intervals={str(name): _interval(ends) for name, ends in held.get("intervals_95", {}).items()},
        recalls=[_recall(one) for one in held.get("recalls", ())],
        calibration=None if calibration is None else Calibration.of(calibration),
    )


def _interval(ends: Sequence[float | None]) -> Interval:
    low, high = (math.nan if end is None else float(end) for end in ends)
    return low, high


def _recall(held: Mapping[str, Any]) -> ClassRecall:
    recall = math.nan if held["recall"] is None else float(held["recall"])
    return ClassRecall(recall, _interval(held["interval"]), int(held["tiles"]), int(held["units"]))


def tracked_metrics(
    rows: Sequence[Row], names: Mapping[str, str] | None = None, compared: Sequence[Comparison] = ()
) -> dict[str, float]:
    """Flat metrics for MLflow, ``encoder/linear/100pct/accuracy`` and the like; undefined ones are left out.

    Args:
        rows: the table.
        names: what features are called there, if not as in the table.
        compared: differences to log, too.
    """
    names = names or {}
    flat = {}
    for row in rows:
        prefix = metric_name(names.get(row.features, row.features), row.classifier, row.budget)
        for name in SCORES:
            mean, sd = row.mean_sd(name)
            flat[f"{prefix}/{name}"], flat[f"{prefix}/{name}_sd"] = mean, sd
        for name, ends in {"accuracy": row.interval, **row.intervals}.items():
            flat[f"{prefix}/{name}_low"], flat[f"{prefix}/{name}_high"] = ends
        for name, values in (row.calibration.errors() if row.calibration else {}).items():
            flat[f"{prefix}/{name}"], flat[f"{prefix}/{name}_sd"] = mean_sd(values)
    for c in compared:
        name = metric_name(names.get(c.against, c.against), c.classifier, c.budget)
        flat[f"difference/{name}"], flat[f"p_holm/{name}"] = c.difference.mean, c.difference.p_holm
        flat[f"difference/{name}_low"], flat[f"difference/{name}_high"] = c.difference.interval
    return {name: value for name, value in flat.items() if math.isfinite(value)}


def log_results(
    config: Any, found: ResolvedEncoder, metrics: Mapping[str, float], files: Sequence[Path], *, name: str,
    digests: Sequence[str], leak: Mapping[str, Any], tags: Mapping[str, str], params: Mapping[str, Any],
    logged: Path | None = None, sets: Sequence[tuple[str, Manifest, str]] = (), shown: str = "", verdict: str = "",
) -> tuple[str, bool]:  # fmt: skip
    """Log a verb's results as an MLflow run; its id, and whether it was logged before.

    Args:
        config: the verb's settings.
        found: the encoder.
        metrics: finite numbers by name.
        files: to keep with the run.
        name: of the run.
        digests: manifests of train and test.
        leak: what these share (``leaks.find_leak``).
        tags: more tags.
        params: more parameters.
        sets: shards, their manifests, and what they were used for: training or testing.
        shown: the table, for the run's description.
        verdict: what it shows, in a sentence.
        logged: JSON file that says which results were logged before, so that a job started again logs them once.

    Raises:
        InputError: the store cannot be used.
    """
    run: dict[str, Any] = {
        "source_run_id": found.source_run_id,
        "name": name,
        "params": {**flatten(config), "encoder_uri": found.uri, **params},
        "metrics": metrics,
        "artifacts": files,
        "tags": {
            "ca2cl.train_manifest_digest": digests[0],
            "ca2cl.test_manifest_digest": digests[1],
            **leak_tag(leak, ENCODER),
            **({VERDICT_TAG: verdict} if verdict else {}),
            **tags,
        },
        "inputs": [describe_input(shards, asdict(manifest), context) for shards, manifest, context in sets],
        "description": f"{name}, encoder `{found.uri}`\n\n{_strong(verdict)}{code_block(shown)}" if shown else "",
        "uri": config.tracking.uri,
        "root": config.tracking.root,
        "experiment": config.tracking.experiment,
    }
    return log_evaluation_once(logged, **run) if logged else (log_evaluation(**run), False)


def _strong(sentence: str) -> str:
    return f"**{sentence}**\n\n" if sentence else ""


def metric_name(features: str, classifier: str, budget: float) -> str:
    """``random_encoder/k-NN/8_per_class``."""
    words = describe_budget(budget).replace(" %", "pct").replace("/", "_per_")
    return f"{features}/{classifier}/{words}".replace(" ", "_")


def metric_names(rivals: Sequence[str]) -> dict[str, str]:
    """Names of other encoders in MLflow: ``against/NAME``, without characters that it does not allow."""
    names: dict[str, str] = {}
    for rival in rivals:
        name = re.sub(r"[^\w.-]+", "-", rival).strip("-.")[-64:]
        taken = f"against/{name}" in names.values()
        names[rival] = f"against/{name}-{len(names) + 1}" if taken else f"against/{name}"
    return names


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON atomically; numbers that are not finite become null, secrets in URIs are taken out.

    Raises:
        InputError: the folder cannot be written.
    """
    text = json.dumps(_finite(redact_all(content)), indent=1, allow_nan=False)
    with writing(path, REMEDY):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (text + "\n").encode(), REMEDY)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw_confusion(
    path: Path, confusion: npt.NDArray[np.int64], classes: Sequence[str], title: str,
    recalls: Sequence[ClassRecall] = (),
) -> None:  # fmt: skip
    """A PNG of a (K, K) confusion matrix: colour is the share of a label's tiles, the text its percentage.

    Args:
        path: of the PNG.
        confusion: counts, rows are labels.
        classes: names of the K classes.
        title: above it.
        recalls: of the classes; their intervals stand beside the labels.
    """
    from matplotlib.figure import Figure

    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    side = 2.5 + 0.55 * len(classes)
    figure = Figure(figsize=(side + (2.0 if recalls else 0.8), side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share, vmin=0, vmax=1, cmap="Blues")
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), _with_recalls(classes, recalls))
    axes.set(xlabel="prediction", ylabel="label")
    figure.suptitle(textwrap.fill(title, int(12 * (side + 0.8))), fontsize=10)  # 12 letters an inch
    for (row, column), value in np.ndenumerate(share):
        if confusion[row, column]:
            colour = "white" if value > 0.5 else "black"
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=colour)
    figure.colorbar(image, label="share of the label's tiles")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120)
    write_atomic(path, drawn.getvalue(), REMEDY)


def _with_recalls(classes: Sequence[str], recalls: Sequence[ClassRecall]) -> list[str]:
    """Names of the classes, each above its recall's interval in percent."""
    if not recalls:
        return list(classes)
    ends = [[round(100 * end) for end in one.interval if not math.isnan(end)] for one in recalls]
    return [f"{name}\n95 %: {end[0]} to {end[1]}" if end else name for name, end in zip(classes, ends, strict=True)]
