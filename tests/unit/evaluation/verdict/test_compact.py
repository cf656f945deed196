"""The compact table: its width, its marks, its heading."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ca2cl.evaluation.compare import compare_with_first
from ca2cl.evaluation.metrics import ClassificationMetrics
from ca2cl.evaluation.result import Row, score_row
from ca2cl.evaluation.statistics import Units
from ca2cl.evaluation.verdict.compact import WIDTH, best_rows, compact
from ca2cl.evaluation.verdict.facts import chance_level
from ca2cl.evaluation.verdict.screen import Summary, files_text, in_bold, summarize

TILES = Units.of(None, 20)
COUNTS = np.array([[9, 3], [4, 4]])


def row(features: str, classifier: str, budget: float, accuracy: float, seeds: int = 1) -> Row:
    scores = ClassificationMetrics(accuracy, 0.5, 0.5, 0.5, 0.5, 0.5, COUNTS)
    return Row(features, classifier, budget, round(budget * 100), [scores] * seeds, [{}] * seeds, (0.4, 0.6))


ROWS = [
    row("encoder", "linear", 0.1, 0.4004),
    row("encoder", "linear", 1.0, 1.0),
    row("encoder", "k-NN", 1.0, 0.05),
    row("random encoder", "linear", 0.1, 0.3996),
    row("random encoder", "linear", 1.0, 0.9994),
    row("random encoder", "k-NN", 1.0, 0.0),
]
TABLE = """top-1 accuracy on test: 20 tiles; chance 0.600 (always the most frequent class)

                linear        k-NN
labels          10 %   100 %  100 %
encoder         .400*  1.00*  .050*
random encoder  .400*  .999   .000
*: best of its column; labelled tiles: 10 % = 10, 100 % = 100
"""


def test_the_table_word_for_word() -> None:
    assert compact(ROWS, TILES, "test") == TABLE


def test_the_most_frequent_class_is_chance() -> None:
    assert chance_level(ROWS[0]) == 12 / 20


def test_bold_marks_the_same_cells_without_moving_any() -> None:
    starred = compact(ROWS, TILES, "test")
    bold = compact(ROWS, TILES, "test", bold=True)
    assert re.findall(r"\x1b\[1m([\d.]+)\x1b\[0m", bold) == re.findall(r"([\d.]+)\*", starred)
    plain = bold.replace("\033[1m", "").replace("\033[0m", "").splitlines()
    assert [line.replace("*", " ").rstrip() for line in starred.splitlines()[:-1]] == plain[:-1]
    assert plain[-1].startswith("bold: best of its column")


def test_heading_names_slides_and_draws() -> None:
    units = Units.of([f"s{n % 4}" for n in range(20)], 20)
    text = compact([row("encoder", "linear", 1.0, 0.5, seeds=3)], units, "norm")
    assert " ".join(text.splitlines()[:2]) == (
        "top-1 accuracy on norm: 20 tiles of 4 slides or patients, mean of 3 draws of labels; chance 0.600 (always the "
        "most frequent class)"
    )
    assert "*" not in text, "a row alone is not the best of anything"


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(["linear", "linear SGD", "k-NN", "fine-tuned"]), min_size=1, max_size=3, unique=True),
    st.lists(st.sampled_from([0.001, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0, 8.0, 20.0, 400.0]), min_size=1, unique=True),
    st.lists(st.text("abc/:", min_size=1, max_size=60), min_size=1, max_size=4, unique_by=lambda name: name[-15:]),
    st.randoms(),
)  # fmt: skip
def test_every_value_is_there_and_no_line_is_too_long(classifiers, budgets, features, random) -> None:  # type: ignore[no-untyped-def]
    rows = [
        row(name, classifier, budget, round(random.uniform(0.001, 0.999), 3))
        for name in features
        for classifier in classifiers
        for budget in budgets
    ]
    lines = compact(rows, TILES, "a-test-set").splitlines()
    assert max(map(len, lines)) <= WIDTH
    shown = re.findall(r"(?<![\d.])\.\d{3}\*?", "\n".join(lines[1:]))
    assert sorted(value.rstrip("*") for value in shown) == sorted(f"{r.mean_sd('accuracy')[0]:.3f}"[1:] for r in rows)
    assert sum(value.endswith("*") for value in shown) == len(best_rows(rows))


def _summary(draws: int, *, leaks: tuple[str, ...] = ()) -> Summary:
    """Of two encoders, of which the first is higher in all but one of ``draws`` draws."""
    generator, units = np.random.default_rng(0), Units.of([f"s{n % 8}" for n in range(80)], 80)
    labels_N, rows = generator.integers(0, 2, 80), []
    for name, rates in (("encoder", [0.95, 0.6, 0.9, 0.9, 0.9]), ("other", [0.6, 0.7, 0.6, 0.6, 0.6])):
        right_SN = [generator.random(80) < rate for rate in rates[:draws]]
        of_seeds = [np.eye(2)[np.where(right_N, labels_N, 1 - labels_N)] for right_N in right_SN]
        rows.append(score_row(name, "linear", 0.1, 8, labels_N, of_seeds, [{}] * draws, units))
    return summarize(rows, {"test": units}, compare_with_first(rows), {"test": leaks}, remarks=leaks)


@pytest.mark.parametrize(("draws", "said"), [(1, False), (2, True), (5, False)])
def test_few_draws_are_named_where_they_leave_a_difference_open(draws: int, said: bool) -> None:
    assert ("2 draws of labels: intervals are very wide; use --seeds 5" in _summary(draws).notes) is said


def test_a_leak_fits_the_screen_and_has_no_note_on_draws() -> None:
    leak = "LEAK: train and test share 4 slides or patients (SLIDE2, SLIDE3, SLIDE4, ...), those of 24 of 36 test tiles"
    found = _summary(2, leaks=(leak,))
    assert found.notes == [leak] and leak in " ".join(found.text().split())
    assert max(map(len, found.text().splitlines())) <= WIDTH


@pytest.mark.parametrize(
    ("terminal", "environment", "bold"),
    [
        (True, {}, True),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (True, {"TERM": "dumb"}, False),
        (False, {}, False),
    ],
)
def test_bold_is_for_terminals_that_want_it(
    terminal: bool, environment: dict[str, str], bold: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert in_bold() is bold


def test_files_are_named_once_in_full_and_in_short_lines() -> None:
    names = ["probe.json", *(f"probe{end}" for end in ("-details.txt", "-confusion.png", "-classifier.safetensors"))]
    assert files_text([Path("runs") / name for name in names]).splitlines() == [
        "all numbers: runs/probe.json",
        "beside it: -details.txt (the long tables; --details prints them),",
        "-confusion.png, -classifier.safetensors",
    ]
