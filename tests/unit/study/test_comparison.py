"""Differences between recipes, against Welch's formula and Holm's procedure written out."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import t as student

from ca2cl.study.comparison import SCORES, best_floor, compare, read_rows, welch
from ca2cl.study.jobs import Job, all_jobs


def result(features: str, classifier: str, budget: float, accuracy: float) -> dict[str, Any]:
    mean = dict.fromkeys(SCORES, accuracy) | {"macro_auroc": None}
    return {"features": features, "classifier": classifier, "budget": budget, "labelled": 30, "mean": mean}


def write_probe(job: Job, results: list[dict[str, Any]]) -> None:
    job.folder.mkdir(parents=True)
    job.probe.write_text(json.dumps({"kind": "probe", "tests": {"test": {"results": results}}}))


ACCURACY = {"a": [0.80, 0.83, 0.79], "b": [0.70, 0.72, 0.71], "c": [0.81, 0.80, 0.84]}


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    made = all_jobs(tmp_path, dict.fromkeys(ACCURACY, 9), 3)
    for job in made:
        value = ACCURACY[job.recipe][job.seed]
        results = [result("encoder", kind, budget, value + shift) for kind, budget, shift in (
            ("linear", 0.1, 0.0), ("linear", 1.0, 0.05), ("k-NN", 0.1, -0.1))]  # fmt: skip
        floors = [result("colour histogram", "linear", 0.1, 0.75), result("random encoder", "linear", 0.1, 0.5)]
        write_probe(job, results + (floors if job.number == 0 else []))
    return made


def slow_welch(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """Welch (1947): interval and p."""
    terms = []
    for values in (a, b):
        mean = sum(values) / len(values)
        terms.append(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
    error = math.sqrt(sum(terms))
    freedom = sum(terms) ** 2 / sum(term**2 / (len(v) - 1) for term, v in zip(terms, (a, b), strict=True))
    mean = sum(a) / len(a) - sum(b) / len(b)
    half = float(student.ppf(0.975, freedom)) * error
    return mean - half, mean + half, 2 * float(student.sf(abs(mean) / error, freedom))


def test_jobs_are_counted_recipe_by_recipe_within_a_seed(jobs: list[Job]) -> None:
    assert [(job.number, job.recipe, job.seed) for job in jobs[:4]] == [
        (0, "a", 0),
        (1, "b", 0),
        (2, "c", 0),
        (3, "a", 1),
    ]
    more = all_jobs(jobs[0].out, dict.fromkeys(ACCURACY, 9), 5)
    assert more[: len(jobs)] == jobs  # another seed renumbers nothing


def test_rows_hold_every_seed_and_floors_once(jobs: list[Job]) -> None:
    rows = {(row.name, row.classifier, row.budget): row for row in read_rows(jobs)}
    assert len(rows) == 3 * 3 + 2
    row = rows["b", "linear", 1.0]
    assert row.seeds == [0, 1, 2] and row.scores["accuracy"] == pytest.approx([0.75, 0.77, 0.76])
    assert row.mean_sd("accuracy") == pytest.approx((0.76, 0.01)) and math.isnan(row.mean_sd("macro_auroc")[0])
    floor = rows["colour histogram", "linear", 0.1]
    assert floor.floor and floor.scores["accuracy"] == [0.75] and math.isnan(floor.mean_sd("accuracy")[1])
    assert best_floor(list(rows.values()), row.place) == {}
    assert best_floor(list(rows.values()), floor.place) == {"colour histogram": 0.75}


def test_a_seed_that_is_missing_stays_missing(jobs: list[Job]) -> None:
    jobs[3].probe.write_text("{")  # a, seed 1: damaged
    rows = {(row.name, row.classifier, row.budget): row for row in read_rows(jobs)}
    assert rows["a", "linear", 0.1].seeds == [0, 2] and rows["b", "linear", 0.1].seeds == [0, 1, 2]


def test_differences_are_welchs_and_holms(jobs: list[Job]) -> None:
    found = compare(read_rows(jobs), "a")
    assert len(found) == 2 * 3
    for one in found:
        low, high, p = slow_welch(ACCURACY["a"], ACCURACY[one.against])
        assert one.interval == pytest.approx((low, high)) and one.p == pytest.approx(p)
        assert one.mean == pytest.approx(np.mean(ACCURACY["a"]) - np.mean(ACCURACY[one.against]))
    linear = [one for one in found if one.classifier == "linear"]
    ordered = sorted(linear, key=lambda one: one.p)
    highest = 0.0
    for place, one in enumerate(ordered):
        highest = max(highest, min(1.0, (len(ordered) - place) * one.p))
        assert one.p_holm == pytest.approx(highest)


@pytest.mark.parametrize(("a", "b"), [([0.5], [0.6, 0.7]), ([0.5, 0.5], [0.5, 0.5]), ([], [])])
def test_without_a_spread_there_is_no_interval(a: list[float], b: list[float]) -> None:
    (low, high), p = welch(a, b)
    assert math.isnan(low) and math.isnan(high) and p == 1.0


def test_welch_calls_few_null_comparisons_real() -> None:
    """Three seeds of unequal spread: at 5 %, 2 to 7 % of 500, and the intervals hold 0 in 93 % or more."""
    generator = np.random.default_rng(0)
    drawn = generator.normal(size=(500, 2, 3)) * np.array([1.0, 1.5])[:, None]
    found = [welch(a.tolist(), b.tolist()) for a, b in drawn]
    assert 0.02 < np.mean([p < 0.05 for _, p in found]) < 0.07
    assert np.mean([low <= 0 <= high for (low, high), _ in found]) > 0.93


def test_every_place_is_compared_once(jobs: list[Job]) -> None:
    found = compare(read_rows(jobs), "a")
    places = [(one.against, one.classifier, one.budget) for one in found]
    wanted = itertools.product(("b", "c"), (("linear", 0.1), ("linear", 1.0), ("k-NN", 0.1)))
    assert sorted(places) == sorted((against, *where) for against, where in wanted)
