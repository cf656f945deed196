"""The sentence under a study's table, its chart and its CSV."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from PIL import Image

from ca2cl.study.chart import draw_chart
from ca2cl.study.comparison import SCORES, Row, by_primary, compare
from ca2cl.study.config import StudyConfig
from ca2cl.study.plan import Plan
from ca2cl.study.recipes import read_study
from ca2cl.study.report import sentence, write_csv


def row(name: str, values: list[float], budget: float = 0.1, classifier: str = "linear", floor: bool = False) -> Row:
    scores = {score: list(values) for score in SCORES}
    return Row(name, floor, classifier, budget, 30, "test", "", list(range(len(values))), scores)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    study = read_study(StudyConfig(file="study_crc5", shards="x", test=("y",)))
    return Plan(study, tmp_path_factory.mktemp("out"), dict.fromkeys(study.recipes, 9), {})


def said(plan: Plan, rows: list[Row], finished: int = 12) -> str:
    return sentence(plan, finished, rows, by_primary(rows, compare(rows, rows[0].name)))


CLOSE = [row("ca2cl", [0.80, 0.83, 0.79]), row("simclr", [0.81, 0.80, 0.84])]


def test_what_seeds_explain_is_no_difference(plan: Plan) -> None:
    text = said(plan, CLOSE)
    assert text.startswith(
        "3 seeds a recipe, 8 minutes each: no recipe differs from ca2cl by more than seeds do (linear"
    )
    assert "Holm over 1 comparison," in text and "smallest p = 0.59" in text
    (one,) = compare(CLOSE, "ca2cl")
    assert f"± {(one.interval[1] - one.interval[0]) / 2:.3f} wide" in text and "floor" not in text


def test_a_difference_is_named_with_its_size_and_the_others_are_not(plan: Plan) -> None:
    rows = [*CLOSE, row("no_cluster", [0.60, 0.61, 0.60])]
    text = said(plan, rows)
    assert "ca2cl is above no_cluster at 10 % labels by 0.203 (p = " in text
    assert (
        "the other differences are no larger than those between seeds (linear probe, Holm over 2 comparisons)" in text
    )
    assert "ca2cl is below" not in text and "simclr" not in text
    better = [CLOSE[0], row("no_cluster", [0.95, 0.96, 0.95])]
    assert "ca2cl is below no_cluster at 10 % labels by 0.147" in said(plan, better)


def test_a_floor_that_no_recipe_is_above_is_named(plan: Plan) -> None:
    floors = [row("colour histogram", [0.9], floor=True), row("random encoder", [0.7], floor=True)]
    assert said(plan, [*CLOSE, *floors]).endswith("At 10 % labels no recipe is above the colour histogram (0.900).")
    assert "histogram" not in said(plan, [*CLOSE, row("colour histogram", [0.81], floor=True)])


def test_an_unfinished_study_and_single_seeds_say_so(plan: Plan) -> None:
    assert said(plan, CLOSE, finished=6).startswith("6 of 12 runs are finished, 8 minutes each: no recipe")
    single = [row("ca2cl", [0.8]), row("simclr", [0.7])]
    assert "one seed says nothing about the spread between seeds" in said(plan, single)
    assert "nothing to compare it with" in said(plan, CLOSE[:1])


def test_the_csv_has_a_line_for_every_seed() -> None:
    rows = [*CLOSE, row("colour histogram", [0.9], floor=True)]
    lines = list(csv.DictReader(io.StringIO(write_csv(rows))))
    assert [(line["recipe"], line["seed"], float(line["accuracy"])) for line in lines] == [
        ("ca2cl", "0", 0.80), ("ca2cl", "1", 0.83), ("ca2cl", "2", 0.79),
        ("simclr", "0", 0.81), ("simclr", "1", 0.80), ("simclr", "2", 0.84), ("colour histogram", "", 0.9),
    ]  # fmt: skip


def test_the_chart_has_a_panel_for_every_budget(tmp_path: Path) -> None:
    sizes = []
    for budgets in ((0.1,), (0.1, 1.0)):
        rows = [row("ca2cl", [0.8, 0.7], b) for b in budgets] + [row("colour histogram", [0.9], 0.1, floor=True)]
        sizes.append(Image.open(io.BytesIO(draw_chart(rows, "mine"))).size)
    assert sizes[1][0] > sizes[0][0] and sizes[1][1] == sizes[0][1]
