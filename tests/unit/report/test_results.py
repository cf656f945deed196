"""Downstream results on the page: which cells are marked, what is drawn, and when a verdict is not repeated."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from ca2cl.evaluation.calibration.reliability import Bin
from ca2cl.evaluation.calibration.summary import Calibration
from ca2cl.registry.downstream import Downstream, Terms
from ca2cl.report.reliability import EDGE, SIDE, diagrams
from ca2cl.report.results import _best, _chances, _verdicts
from tests.unit.evaluation.verdict.test_compact import ROWS, row

HELD = {"verdict": {"sentence": "Ahead of random weights.", "outcome": "ahead"}}


def test_the_best_of_every_score_is_marked_whoever_has_it() -> None:
    assert _best(ROWS, several=False) == [
        {4, 5, 6, 7}, {4, 5, 6, 7}, {4, 5, 6, 7}, {4, 5, 6, 7}, {5, 6, 7}, {5, 6, 7},
    ]  # fmt: skip
    assert _best(ROWS[:3], several=True) == [set(), set(), set()]


def test_chance_is_named_for_every_test_set() -> None:
    told = _chances([replace(one, test=test) for test in ("a", "b") for one in ROWS])
    assert told == [
        f"Top-1 accuracy at chance on {test}, always naming the most frequent class: 0.600." for test in ("a", "b")
    ]


@pytest.mark.parametrize(
    ("terms", "held", "said"),
    [
        (Terms("probe", "a", "b"), HELD, ["Ahead of random weights."]),
        (Terms("probe", "a", "b", leak="found since"), HELD, []),
        (Terms("probe", "a", "b"), {}, []),
        (Terms("probe", "a", "b", "original"), {"verdict": {"sentence": "No verdict.", "outcome": "none"}},
         ["No verdict."]),
    ],
)  # fmt: skip
def test_a_verdict_stands_only_as_long_as_no_leak_is_known(terms: Terms, held: dict, said: list[str]) -> None:
    run = Downstream("", terms, None, "", "", {}, {})
    assert _verdicts(run, {"": held}) == said
    assert _verdicts(run, {"a": held, "b": {}}) == [f"a: {one}" for one in said]


def test_a_reliability_diagram_has_a_dot_for_each_bin_and_bands_where_they_are_known() -> None:
    bins = [Bin(0, 9, 0.0, 0.0, math.nan, math.nan), Bin(14, 1, 1.0, 1.0, 0.5, 1.0)]
    calibrated = replace(row("encoder", "linear", 1.0, 0.5), calibration=Calibration([], bins, [], [], []))
    assert diagrams([row("encoder", "linear", 1.0, 0.5)]) == []
    (found,) = diagrams([calibrated])
    (line,) = found.lines
    low, high = (EDGE, SIDE - EDGE), (SIDE - 8, 8)
    assert (found.title, line.label, line.dots) == ("encoder, linear", "raw", [low, high])
    assert line.bands == [(high[0], (low[1] + high[1]) / 2, high[1])]
    assert [place[:2] for place in found.ticks] == [low, ((low[0] + high[0]) / 2, (low[1] + high[1]) / 2), high]
