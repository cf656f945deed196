"""Table of published and own results, with what differs."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ca2cl.common.tables import aligned
from ca2cl.evaluation.datasets import describe_missing
from ca2cl.evaluation.finetune import original
from ca2cl.evaluation.finetune.original import ALWAYS, differences, protocol_of
from ca2cl.evaluation.leaks.wording import lines as leak_lines
from ca2cl.evaluation.report import describe_interval, plus_minus, row_as_dict, spread
from ca2cl.evaluation.result import ENCODER, Row
from ca2cl.evaluation.splits import describe_budget
from ca2cl.evaluation.statistics import Units
from ca2cl.reproduce.config import TEST_SET, NctConfig, jobs, tuning
from ca2cl.reproduce.published_results import (
    ARCHITECTURE,
    CHOICE,
    FINETUNED,
    FOUNDATION,
    IMAGE_SIZE,
    LINEAR,
    Published,
)

FINE_TUNED = "fine-tuned"
_HEADS = ("classifier", "labels", "tiles", "accuracy", "theirs", "last epoch", "95 %", "macro F1", "theirs")


@dataclass(frozen=True)
class Line:
    """A row of ours and theirs."""

    ours: Row
    theirs: Published | None

    @property
    def title(self) -> str:
        """The classifier, and what it starts from where that is not the encoder."""
        start = self.ours.features
        return self.ours.classifier + ("" if start == ENCODER else f" from {start}")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        theirs = self.theirs._asdict() if self.theirs else None
        return {**row_as_dict(self.ours), "theirs": theirs}


def lines(rows: Sequence[Row]) -> list[Line]:
    """Every row with its cell of their tables or logs, where these have it."""
    found = []
    for row in rows:
        published = FINETUNED if row.classifier == FINE_TUNED else LINEAR
        found.append(Line(row, published.get(row.features, {}).get(row.budget)))
    return found


def table(shown: Sequence[Line]) -> str:
    """The lines as aligned text: mean ± sd over seeds, theirs, and the accuracy's 95 % interval."""
    cells = []
    for line in shown:
        ours, theirs = line.ours, line.theirs or Published(math.nan, math.nan)
        cells.append([
            line.title, describe_budget(ours.budget), str(ours.labelled), plus_minus(*spread(ours, "accuracy")),
            _with_sd(theirs.accuracy, theirs.accuracy_sd), _short(theirs.last_epoch), describe_interval(ours.interval),
            plus_minus(*spread(ours, "macro_f1")), _with_sd(theirs.macro_f1, theirs.macro_f1_sd),
        ])  # fmt: skip
    return aligned(_HEADS, cells)


def _short(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4f}".rstrip("0").ljust(5, "0")


def _with_sd(mean: float, sd: float | None) -> str:
    return _short(mean) if sd is None else f"{mean:.4f} ± {sd:.4f}"


def notes(config: NctConfig, facts: Mapping[str, Any], made_up: bool) -> list[str]:
    """Notes under the table, one a line."""
    found = []
    if made_up:
        found.append("MADE-UP TISSUE: these tiles were drawn; theirs are shown for their places alone")
    found += leak_lines({"test_tiles": facts["tiles"][1], **facts["leak"]})
    if facts.get("missing_classes"):
        found.append(describe_missing(facts["missing_classes"]))
    found.append(facts.get("resampled", Units.of(None, facts["tiles"][1]).as_dict())["statement"])
    same, other = _comparison(config, facts)
    found.append(f"the same as theirs: {'; '.join(same) or 'nothing'}")
    found.append(f"not the same, or not known of theirs: {'; '.join(other)}")
    if config.protocol == "honest":
        found.append("protocol honest: held-out labelled tiles chose, the test tiles were predicted once")
    for trains in jobs(config) if config.protocol == "original" else []:
        job, task = tuning(config, trains), "fine-tuning" if trains == "all" else "linear probe"
        found.append(f"{task}, what still differs from the authors' code: {'; '.join([*differences(job), *ALWAYS])}")
        found.append(protocol_of(job).statement)
    found.append(CHOICE)
    models = ", ".join(f"{name} {_short(value)}" for name, value in FOUNDATION.items())
    found.append(f"foundation models, a linear probe on all labels, accuracy: {models}")
    return found


def _comparison(config: NctConfig, facts: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Settings that are the same as theirs, and those that are not."""
    pairs = [
        (f"test set {TEST_SET}", facts["test_tiles_published"] == facts["tiles"][1],
         f"{facts['tiles'][1]} test tiles, {facts['test_tiles_published']} in {TEST_SET}"),
        (f"encoder {ARCHITECTURE}", facts["arch"] == ARCHITECTURE, f"encoder {facts['arch']}, theirs {ARCHITECTURE}"),
        (f"{IMAGE_SIZE} px", facts["image_size"] == IMAGE_SIZE, f"{facts['image_size']} px, theirs {IMAGE_SIZE}"),
        ("protocol original", config.protocol == "original",
         "protocol honest, theirs drew labels with replacement, whatever the class"),
    ]  # fmt: skip
    same = [text for text, equal, _ in pairs if equal]
    other = [text for _, equal, text in pairs if not equal]
    other.append(f"labels drawn {config.seeds} times from {config.train_set} ({facts['tiles'][0]} tiles)")
    if "linear" in config.tasks and config.protocol == "honest":
        other.append("linear is by L-BFGS, linear SGD with a recipe of ours, both on tiles that are not augmented")
    if "finetune" in config.tasks and config.protocol == "honest":
        job = original.settled(tuning(config))
        other.append(f"fine-tuning for {job.epochs} epochs and {job.min_steps} steps at least, batches of "
                     f"{job.batch_size}, augmentation {job.augment}")  # fmt: skip
    return same, other


def draw_chart(shown: Sequence[Line], title: str) -> bytes:
    """A PNG: accuracy and macro F1 against the label budget, ours with sd over seeds and theirs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    shares = [line for line in shown if line.ours.budget <= 1]
    for place, (score, name) in enumerate((("accuracy", "top-1 accuracy"), ("macro_f1", "macro F1"))):
        axes = figure.add_subplot(1, 2, place + 1)
        for number, kind in enumerate(dict.fromkeys(line.title for line in shares)):
            _draw_curve(axes, [line for line in shares if line.title == kind], score, kind, f"C{number}")
        axes.set(xscale="log", xlabel="labelled tiles, %", ylabel=name)
        ticks = sorted({100 * line.ours.budget for line in shares})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        if shares:
            axes.legend(fontsize=7)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120)
    return drawn.getvalue()


def _draw_curve(axes: Any, curve: Sequence[Line], score: str, kind: str, colour: str) -> None:
    curve = sorted(curve, key=lambda line: line.ours.budget)
    x = [100 * line.ours.budget for line in curve]
    means, spreads = zip(*(line.ours.mean_sd(score) for line in curve), strict=True)
    spreads = tuple(0.0 if math.isnan(sd) else sd for sd in spreads)
    axes.errorbar(x, means, spreads, color=colour, marker="o", capsize=3, label=f"{kind}, ours")
    theirs = [(100 * line.ours.budget, getattr(line.theirs, score)) for line in curve if line.theirs]
    if theirs and kind != "linear":  # drawn once for both linear classifiers
        axes.plot(*zip(*theirs, strict=True), color=colour, marker="x", linestyle="--", label=f"{kind}, theirs")
