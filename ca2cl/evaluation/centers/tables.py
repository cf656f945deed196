"""Tables of robustness from the JSON, for terminal and report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ca2cl.common.tables import aligned
from ca2cl.evaluation.centers.shift_scores import CLEAN
from ca2cl.evaluation.splits import describe_budget

Content = Mapping[str, Any]
_MOST_COLUMNS = 6


@dataclass(frozen=True)
class Table:
    """One table under a title."""

    title: str
    heads: Sequence[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """For the terminal."""
        notes = "".join(f"{note}\n" for note in self.notes)
        return f"\n{self.title}\n{aligned(self.heads, self.rows)}{notes}"


def tables(content: Content) -> list[Table]:
    """All tables of a probe's robustness; empty where nothing was measured.

    Raises:
        KeyError, TypeError, ValueError: it is not the content that this version writes.
    """
    found = []
    for scope in content.get("centers") or ():
        found += list(_centers(scope))
    for probe in content.get("slide_probe") or ():
        found.append(_identity(probe, probe["test"]))
    if content.get("drops"):
        found.append(_drops(content["drops"], str(content.get("first_test", "the first test set"))))
    if content.get("shifts"):
        found.append(_shifts(content["shifts"]))
    return found


def _centers(scope: Content) -> Iterator[Table]:
    where, centers = scope["test"], scope["centers"]
    named = ", ".join(f"{name} ({held['tiles']})" for name, held in list(centers.items())[:_MOST_COLUMNS])
    named += f" and {len(centers) - _MOST_COLUMNS} more" if len(centers) > _MOST_COLUMNS else ""
    if not scope["indices"]:
        notes = ["nothing to compare: give test tiles of two centres or more, and more than 21 of them"]
        yield Table(f"robustness to centres, {where}", ["centres (tiles)"], [[named or "none"]], notes)
        return
    rows = [
        [
            one["features"], _with(one["ri"], one["ri_interval_95"]), _with(one["mari"], one["mari_interval_95"]),
            _with(one["croma"], one["croma_interval_95"], sign=True), _number(one["croma_tail"], sign=True),
            _percent(one["center_nearer"]), str(one["k"]), _percent(one["support"]), _percent(one["croma_support"]),
        ]
        for one in scope["indices"]
    ]  # fmt: skip
    heads = ["features", "RI [95 %]", "MaRI [95 %]", "CRoMa [95 %]", "lowest 10 %", "centre nearer", "k", "support",
             "CRoMa support"]  # fmt: skip
    notes = [f"centres (tiles): {named}", _resampled(scope)]
    if scope["scored_tiles"] < scope["tiles"]:
        notes.append(f"indices of {scope['scored_tiles']} of {scope['tiles']} tiles, drawn by centre and class")
    yield Table(f"robustness to centres, {where}: above .5 (CRoMa: 0) class outweighs centre", heads, rows, notes)
    if scope.get("accuracy"):
        yield _accuracy(scope["accuracy"], where)
    if scope["probe"] is not None:
        yield _identity(scope["probe"], where)


def _resampled(held: Content) -> str:
    return f"95 %: {held['units']} {_plural(held['unit'])} resampled; it says nothing about other centres"


def _plural(unit: str) -> str:
    return "tiles" if unit == "tile" else "slides or patients"


def _accuracy(rows: Sequence[Content], where: str) -> Table:
    names = list(rows[0]["accuracy"])
    unseen = [name for name, tiles in rows[0]["training_tiles"].items() if not tiles]
    notes = [f"not among the training tiles: {', '.join(unseen)}"] if 0 < len(unseen) < len(names) else []
    shown, cells = names, [[_number(row["accuracy"][name]) for name in names] for row in rows]
    if len(names) > _MOST_COLUMNS:
        shown = ["lowest", "highest"]
        cells = [
            [f"{_number(row['accuracy'][name])} ({name})" for name in _ends(row["accuracy"])] for row in rows
        ]  # fmt: skip
    spread = [_number(max(row["accuracy"].values()) - min(row["accuracy"].values())) for row in rows]
    return Table(
        f"top-1 accuracy by centre, {where}, {describe_budget(rows[0]['budget'])} labels",
        ["features", "classifier", *shown, "spread"],
        [
            [row["features"], row["classifier"], *values, gap]
            for row, values, gap in zip(rows, cells, spread, strict=True)
        ],
        notes,
    )


def _ends(accuracy: Mapping[str, float]) -> tuple[str, str]:
    return min(accuracy, key=lambda name: accuracy[name]), max(accuracy, key=lambda name: accuracy[name])


def _identity(probe: Content, where: str) -> Table:
    heads = ["features", "classifier", "balanced acc. [95 %]"]
    if not probe.get("scores"):
        return Table(f"probe of the slide, {where}", heads, [], ["fewer than two slides with five tiles are known"])
    what, count = probe["what"], len(probe["targets"])
    held = (
        "tiles held out within slides"
        if what == "slide"
        else f"{'' if probe['unit'] == 'tile' else 'whole '}{_plural(probe['unit'])} held out"
    )
    rows = [
        [one["features"], one["classifier"], _with(one["balanced_accuracy"], one["interval_95"])]
        for one in probe["scores"]
    ]
    rows.append([f"chance, 1 of {count}", "", _number(probe["chance"])])
    title = f"{what} predicted from the features, {where}: {probe['tiles']} tiles, {held}; lower is more robust"
    return Table(title, heads, rows, list(probe["notes"]))


def with_most_labels(rows: Sequence[Content]) -> list[Content]:
    """Those with the largest budget: all labels stand above any number of tiles a class."""
    most = max(((row["budget"] == 1, row["budget"]) for row in rows), default=(False, 0))[1]
    return [row for row in rows if row["budget"] == most]


def _drops(rows: Sequence[Content], first: str) -> Table:
    shown = with_most_labels(rows)
    ways = {
        f"{row['test']}: "
        + ("tiles of the same key and class, one by one" if row["by"] == "tile" else "slides of both sets vary")
        for row in shown
    }
    return Table(
        f"drop in top-1 accuracy from {first}, {describe_budget(shown[0]['budget'])} labels",
        ["features", "classifier", "to", first, "there", "drop [95 %]"],
        [
            [
                row["features"], row["classifier"], row["test"], _number(row["accuracy"]),
                _number(row["other_accuracy"]), _with(row["mean"], row["interval_95"], sign=True),
            ]
            for row in shown
        ],
        sorted(ways),
    )  # fmt: skip


def _shifts(shifts: Content) -> Table:
    found = {(one["features"], one["family"], one["strength"]): one for one in shifts["scores"]}
    strongest = max(strength for _, _, strength in found)
    rows = []
    for name, family in dict.fromkeys((features, family) for features, family, _ in found if family != CLEAN):
        line = [found[name, CLEAN, 0], *(found[name, family, strength] for strength in range(1, strongest + 1))]
        drop = _with(line[-1]["drop"], line[-1]["drop_interval_95"], sign=True)
        rows.append([name, family, *(_number(one["accuracy"]) for one in line), drop])
    settings = "; ".join(f"{name}: {setting}" for name, setting in shifts["settings"].items())
    title = (
        f"top-1 accuracy on shifted tiles of {shifts['test']}: {shifts['classifier']}, "
        f"{describe_budget(shifts['budget'])} labels, first draw"
    )
    strengths = [str(strength) for strength in range(1, strongest + 1)]
    return Table(title, ["features", "shift", CLEAN, *strengths, f"drop at {strongest} [95 %]"], rows, [settings])


def _with(value: float | None, interval: Sequence[float | None], sign: bool = False) -> str:
    low, high = interval
    if _undefined(low) or _undefined(high):
        return _number(value, sign)
    return f"{_number(value, sign)} [{_number(low, sign)}, {_number(high, sign)}]"


def _number(value: float | None, sign: bool = False) -> str:
    if _undefined(value):
        return "undefined"
    return f"{value:+.3f}" if sign else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "undefined" if value is None or math.isnan(value) else f"{100 * value:.0f} %"


def _undefined(value: float | None) -> bool:
    return value is None or math.isnan(value)
