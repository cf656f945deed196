"""Report of a detection job: tables, differences, JSON, MLflow run."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ca2cl import __version__
from ca2cl.common.console.summary import closing
from ca2cl.common.files import file_digest
from ca2cl.common.grid import AGAIN, Grid
from ca2cl.common.records import read_fields
from ca2cl.common.tables import aligned
from ca2cl.config import flatten
from ca2cl.detection.engines.base import CocoSplit
from ca2cl.detection.train.config import DetectConfig
from ca2cl.detection.train.inputs import describe_splits
from ca2cl.detection.train.trial import CELLS, DETECTOR, FIRST, Trial
from ca2cl.errors import InputError
from ca2cl.evaluation.leaks.wording import Leak, lines, tag
from ca2cl.evaluation.metrics import mean_sd
from ca2cl.evaluation.report import metric_names, write_json
from ca2cl.registry.evaluation_run import LEAK_TAG, log_evaluation_once
from ca2cl.store.locate import store_flag
from ca2cl.store.notes import code_block, short_name
from ca2cl.store.open import store_place

if TYPE_CHECKING:
    from ca2cl.registry.resolve import ResolvedEncoder

RESULTS, LOGGED = "detect-results.json", "logged.json"
SCHEMA_VERSION = 1
_COLUMNS = {
    "box/AP": "AP box", "box/AP50": "AP50", "box/AP75": "AP75", "mask/AP": "AP mask", "f1": "object F1",
    "dice": "object Dice", "hausdorff": "Hausdorff px",
}  # fmt: skip
_OF_ONE_TRAINING = ("seed", "start", "scores", "run_id", "steps")
Scores = dict[str, dict[str, dict[str, list[float]]]]
"""Split → encoder, ``FIRST.start`` before the others → score → one value a seed."""


def report(
    config: DetectConfig,
    found: ResolvedEncoder,
    grid: Grid[Trial],
    splits: Mapping[str, CocoSplit],
    leaks: Mapping[str, Leak],
) -> None:
    """Print, write and log the results of all trainings.

    Args:
        config: the verb's.
        found: the encoder that the job is about.
        grid: the trials, all done.
        splits: train and the scored ones, by name.
        leaks: what each scored split shares with train.

    Raises:
        InputError: a result is damaged, or trainings were made by different engines; the store cannot be reached.
    """
    out = Path(config.output_dir).expanduser()
    results = {trial: read_fields(path, (), AGAIN) for trial, path in grid.items()}
    made = _made_by(results, grid)
    scores = _gathered(results)
    text = "".join(_table(split, of_split) for split, of_split in scores.items()) + _differences(scores)
    text += "".join(f"{line}\n" for split, leak in leaks.items() for line in lines(leak, split))
    digests = {name: file_digest(split.annotations) for name, split in splits.items()}
    content = {
        "schema_version": SCHEMA_VERSION,
        "kind": "detect",
        "ca2cl": __version__,
        "encoder": {"uri": found.uri, "source_run_id": found.source_run_id, "card": asdict(found.card)},
        "data": digests,
        "leaks": leaks,
        "made_by": made,
        "config": flatten(config),
        "trainings": list(results.values()),
    }
    write_json(out / RESULTS, content)
    seeds = f"mean ± sd over {config.seeds} seeds" if config.seeds > 1 else "one seed, which says little: use seeds 5"
    sys.stdout.write(f"{text}\nengine {made['engine']} {made['engine_version']}, {made['head']}, ")
    sys.stdout.write(f"{made['iterations']} steps of {made['batch_size']} images; {seeds}\n")
    sys.stdout.write(f"detectors, predictions and pictures in {out / CELLS}; written to {out / RESULTS}\n")
    sys.stdout.flush()
    about = {
        "description": f"Detection on {config.dataset}, body from encoder `{found.uri}`\n\n{code_block(text)}",
        "inputs": describe_splits(splits),
        "children": [str(result["run_id"]) for result in results.values() if result.get("run_id")],
    }
    run_id, before = _log(config, found, out, _metrics(scores), made, digests, leaks, about)
    place = store_place(config.tracking.uri, config.tracking.root)
    sys.stdout.write(f"logged as MLflow run {run_id} in {place}{' already' if before else ''}\n")
    use = ["ca2cl", "detect", "predict", out / CELLS / FIRST.name / DETECTOR, "IMAGES", "OUT"]
    sys.stdout.write(
        closing("gland detectors", out, use, ["ca2cl", "ui", *store_flag(config.tracking.uri, config.tracking.root)])
    )


def _made_by(results: Mapping[Trial, Mapping[str, Any]], grid: Grid[Trial]) -> dict[str, Any]:
    """Settings and versions that all trainings share: no mean is taken over those of two engines."""
    made = [{k: v for k, v in result.items() if k not in _OF_ONE_TRAINING} for result in results.values()]
    for trial, one in zip(results, made, strict=True):
        # of an earlier version's result some settings are not known: they had no other value then
        changed = [name for name in one if name in made[0] and one[name] != made[0][name]]
        if changed:
            raise InputError(
                f"{grid[trial].parent}: trained with another {', '.join(changed)} than the first; delete that "
                "folder and start again"
            )
    return made[0]


def _gathered(results: Mapping[Trial, Mapping[str, Any]]) -> Scores:
    gathered: Scores = {}
    for trial, result in results.items():
        for split, of_split in result["scores"].items():
            of_start = gathered.setdefault(split, {}).setdefault(trial.start, {})
            for name, value in of_split.items():
                of_start.setdefault(name, []).append(value)
    return gathered


def _table(split: str, of_split: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    columns = [name for name in _COLUMNS if any(name in scores for scores in of_split.values())]
    rows = [[start, *(_spread(scores.get(name, []), name) for name in columns)] for start, scores in of_split.items()]
    return f"{split}\n" + aligned(["body from", *(_COLUMNS[name] for name in columns)], rows) + "\n"


def _spread(values: Sequence[float], name: str) -> str:
    if not values:
        return "-"
    digits = 1 if name == "hausdorff" else 4
    mean, sd = mean_sd(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(sd) else f" ± {sd:.{digits}f}")


def _differences(scores: Scores) -> str:
    """The encoder less every other one, seed by seed: the same order of images and the same new weights in the head."""
    text = ""
    for split, of_split in scores.items():
        for start in list(of_split)[1:]:
            less = np.subtract(of_split[FIRST.start]["box/AP"], of_split[start]["box/AP"])
            mean, sd = mean_sd(less.tolist())
            spread = "" if math.isnan(sd) else f" ± {sd:.4f}, {(less > 0).sum()} of {len(less)} seeds above"
            text += f"{FIRST.start} less {start}, {split}, AP box: {mean:+.4f}{spread}\n"
    return text


def _metrics(scores: Scores) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for split, of_split in scores.items():
        names = {FIRST.start: "encoder", **metric_names(list(of_split)[1:])}
        for start, values in of_split.items():
            for name, seeds in values.items():
                key = f"{names[start]}/{split}/{name}"
                metrics[key], sd = mean_sd(seeds)
                if not math.isnan(sd):
                    metrics[f"{key}_sd"] = sd
    return metrics


def _log(
    config: DetectConfig, found: ResolvedEncoder, out: Path, metrics: Mapping[str, float], made: Mapping[str, Any],
    digests: Mapping[str, str], leaks: Mapping[str, Leak], about: Mapping[str, Any],
) -> tuple[str, bool]:  # fmt: skip
    # a job's numbers are compared as one: what is wrong with a split is wrong with them
    kinds = [f"{kind} ({split})" for split, leak in leaks.items() for kind in tag(leak, FIRST.start).values()]
    tests = [digest for name, digest in digests.items() if name != "train"]
    return log_evaluation_once(
        out / LOGGED,
        source_run_id=found.source_run_id,
        name=config.tracking.run_name or f"detect {config.dataset} from {short_name(found.uri)}",
        params={**flatten(config), "encoder_uri": found.uri},
        metrics=metrics,
        artifacts=[out / RESULTS, *sorted(out.glob("cells/*-seed0/figures/*.png"))],
        tags={
            # a result of another engine is another kind: the two are never compared as one
            "ca2cl.kind": f"detect-{made['engine']}",
            "ca2cl.engine": f"{made['engine']} {made['engine_version']}",
            "ca2cl.protocol": "honest",
            **({LEAK_TAG: "; ".join(kinds)} if kinds else {}),
            "ca2cl.train_manifest_digest": digests["train"],
            "ca2cl.test_manifest_digest": hashlib.sha256("".join(tests).encode()).hexdigest(),
        },
        uri=config.tracking.uri,
        root=config.tracking.root,
        experiment=config.tracking.experiment,
        **about,
    )
