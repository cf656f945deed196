"""Small table of accuracies within 80 columns, the best of each column marked."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ca2cl.evaluation.result import Row
from ca2cl.evaluation.splits import describe_budget
from ca2cl.evaluation.statistics import Units
from ca2cl.evaluation.verdict.facts import chance_level
from ca2cl.evaluation.verdict.rivals import short

WIDTH = 79
_BOLD, _PLAIN = "\033[1m", "\033[0m"
_VALUE = 5  # .262*


def compact(rows: Sequence[Row], units: Units, test: str, *, bold: bool = False) -> str:
    """Accuracy by features, classifier and label budget, under a line that names the metric, the tiles and chance.

    Args:
        rows: of one test set.
        units: what its tiles were resampled by.
        test: its name.
        bold: mark the best values by a terminal's bold type; otherwise by a star.
    """
    held = {(row.features, row.classifier, row.budget): row for row in rows}
    features = list(dict.fromkeys(row.features for row in rows))
    names = {name: short(name) for name in features}
    side = max(len(name) for name in ("labels", *names.values()))
    best, text = best_rows(rows), ""
    for block in _blocks(rows, WIDTH - side):
        text += "\n" + _line("", [group.classifier.ljust(group.width) for group in block], side)
        text += _line("labels", [group.joined(map(describe_budget, group.budgets)) for group in block], side)
        for name in features:
            found = [[held.get((name, group.classifier, budget)) for budget in group.budgets] for group in block]
            parts = [
                group.joined(_value(row, best, bold) for row in of) for group, of in zip(block, found, strict=True)
            ]
            text += _line(names[name], parts, side)
    return f"{_title(rows, units, test)}\n{text}{_legend(rows, bool(best), bold)}\n"


def best_rows(rows: Sequence[Row], score: str = "accuracy") -> set[int]:
    """``id`` of the rows with the best score of their classifier, budget and test set.

    Of rows that are equal in three digits each is best. A row alone has nothing to be better than.

    Args:
        rows: of all features.
        score: of ``ClassificationMetrics``; a higher one is better.
    """
    columns: dict[tuple[str, float, str], list[Row]] = {}
    for row in rows:
        columns.setdefault((row.classifier, row.budget, row.test), []).append(row)
    found: set[int] = set()
    for column in columns.values():
        digits = {id(row): _digits(row, score) for row in column}
        highest = max((text for text in digits.values() if text != "nan"), default="")
        found |= {row for row, text in digits.items() if text == highest and len(column) > 1}
    return found


def _digits(row: Row, score: str = "accuracy") -> str:
    return f"{row.mean_sd(score)[0]:.3f}"


def _value(row: Row | None, best: set[int], bold: bool) -> str:
    if row is None:
        return "-"
    text = _digits(row)
    text = "1.00" if text == "1.000" else text.removeprefix("0")
    if id(row) not in best:
        return text
    return f"{_BOLD}{text}{_PLAIN}" if bold else f"{text}*"


@dataclass(frozen=True)
class _Group:
    """Columns of one classifier, side by side."""

    classifier: str
    budgets: Sequence[float]

    @property
    def widths(self) -> list[int]:
        return [max(_VALUE, len(describe_budget(budget))) for budget in self.budgets]

    @property
    def width(self) -> int:
        return max(len(self.classifier), sum(self.widths) + 2 * (len(self.widths) - 1))

    def joined(self, words: Iterable[str]) -> str:
        """The words under one another's columns."""
        padded = [word + " " * (width - _visible(word)) for word, width in zip(words, self.widths, strict=True)]
        text = "  ".join(padded)
        return text + " " * (self.width - _visible(text))


def _visible(text: str) -> int:
    return len(text.replace(_BOLD, "").replace(_PLAIN, ""))


def _line(name: str, parts: Sequence[str], side: int) -> str:
    return "  ".join([name.ljust(side), *parts]).rstrip() + "\n"


def _blocks(rows: Sequence[Row], room: int) -> list[list[_Group]]:
    """Groups of columns side by side, as many as fit."""
    budgets: dict[str, list[float]] = {}
    for row in rows:
        of_classifier = budgets.setdefault(row.classifier, [])
        of_classifier += [row.budget] if row.budget not in of_classifier else []
    blocks: list[list[_Group]] = [[]]
    for classifier, named in budgets.items():
        for group in _split(_Group(classifier, named), room):
            if blocks[-1] and sum(2 + one.width for one in [*blocks[-1], group]) > room:
                blocks.append([])
            blocks[-1].append(group)
    return blocks


def _split(group: _Group, room: int) -> list[_Group]:
    """One group, or several of which each fits."""
    if 2 + group.width <= room or len(group.budgets) == 1:
        return [group]
    half = len(group.budgets) // 2
    parts = (group.budgets[:half], group.budgets[half:])
    return [one for part in parts for one in _split(_Group(group.classifier, part), room)]


def _title(rows: Sequence[Row], units: Units, test: str) -> str:
    tiles, draws = int(rows[0].per_seed[0].confusion.sum()), len(rows[0].per_seed)
    slides = f" of {units.count} slides or patients" if units.known else ""
    mean = f", mean of {draws} draws of labels" if draws > 1 else ""
    chance = f"chance {chance_level(rows[0]):.3f} (always the most frequent class)"
    return textwrap.fill(f"top-1 accuracy on {test}: {tiles} tiles{slides}{mean}; {chance}", WIDTH)


def _legend(rows: Sequence[Row], marked: bool, bold: bool) -> str:
    labelled = {row.budget: row.labelled for row in rows}
    tiles = ", ".join(f"{describe_budget(budget)} = {count}" for budget, count in labelled.items())
    mark = f"{'bold' if bold else '*'}: best of its column; " if marked else ""
    return textwrap.fill(f"{mark}labelled tiles: {tiles}", WIDTH)
