"""Rows of a probe on made-up features: protocols, several test sets, slides that are held out whole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ca2cl.evaluation.compare import compare_with_first, differences
from ca2cl.evaluation.features import Features
from ca2cl.evaluation.probe.classifiers import DEFAULT_STRENGTH, choose_strength, logistic_regression
from ca2cl.evaluation.probe.scoring import KNN, LINEAR, SGD, Scoring, score
from ca2cl.evaluation.probe.sgd import RECIPE
from ca2cl.evaluation.protocol import HONEST, ORIGINAL, Protocol
from ca2cl.evaluation.result import Row
from ca2cl.evaluation.splits import draw_subsets, slide_folds
from tests.unit.evaluation.probe.test_classifiers import clouds

QUICK = replace(RECIPE, epochs=10, min_steps=20)


def features(count: int, seed: int, *, wrong: bool = False, spread: float = 3.0) -> Features:
    """Overlapping clouds as ``encoder``, noise as ``floor``; ``wrong`` gives every tile another class's label."""
    values, labels = clouds(count, spread=spread, seed=seed)
    noise = np.random.default_rng(seed).normal(size=values.shape).astype(np.float32)
    labels = (labels + 1) % 3 if wrong else labels
    return Features({"encoder": values, "floor": noise}, labels, np.arange(count), [b""] * count)


def rows_by(protocol: Protocol, classifier: str = SGD, strength: float | str = "auto") -> dict[str, Row]:
    """The rows of test sets with right and with wrong labels, at 150 labelled tiles."""
    train = features(150, 0)
    tests = {"right": features(90, 1), "wrong": features(90, 1, wrong=True)}
    subsets = draw_subsets(train.labels_N, [1.0], 1, protocol=protocol)
    how = Scoring(strength=strength, classifiers=[classifier], protocol=protocol, recipe=QUICK)  # type: ignore[arg-type]
    return {row.test: row for row in score(train, tests, subsets, how) if row.features == "encoder"}


def test_original_draws_with_replacement() -> None:
    labels = np.arange(300) % 3
    for protocol, distinct in ((HONEST, 300), (ORIGINAL, 190)):
        (rows,) = draw_subsets(labels, [1.0], 1, protocol=protocol, groups=["s"] * 300)[1.0]
        assert len(rows) == 300 and abs(len(np.unique(rows)) - distinct) < 20


def test_original_holds_nothing_out() -> None:
    assert rows_by(HONEST)["right"].settings[0]["held_out"] == 30
    assert rows_by(ORIGINAL)["right"].settings[0]["held_out"] == 0
    train, labels = clouds(150, spread=0.3)
    only = replace(HONEST, holds_out=False)  # nor is there anything then that could choose a strength
    assert logistic_regression(train, labels, train, seed=0, protocol=only).setting == {"C": DEFAULT_STRENGTH}
    assert logistic_regression(train, labels, train, seed=0).setting != {"C": DEFAULT_STRENGTH}


def test_original_lets_each_test_set_choose_an_epoch_and_honest_none() -> None:
    honest, original = (rows_by(protocol) for protocol in (HONEST, ORIGINAL))
    assert honest["right"].settings == honest["wrong"].settings
    assert original["right"].settings != original["wrong"].settings
    fewer = rows_by(replace(ORIGINAL, selects_on_test=False))
    for test in ("right", "wrong"):
        assert original[test].mean_sd("accuracy")[0] >= fewer[test].mean_sd("accuracy")[0]


def test_no_test_tile_chooses_a_strength_by_any_protocol() -> None:
    """The authors fitted no logistic regression: there is nothing of theirs to repeat."""
    for protocol in (HONEST, ORIGINAL):
        found = rows_by(protocol, LINEAR)
        assert found["right"].settings == found["wrong"].settings, protocol
    assert rows_by(ORIGINAL, LINEAR)["right"].settings == [{"C": DEFAULT_STRENGTH}]


def test_a_fixed_strength_stays_by_any_protocol() -> None:
    assert rows_by(ORIGINAL, LINEAR, 0.5)["wrong"].settings == [{"C": 0.5}]


def test_a_test_set_scores_the_same_beside_others_and_alone() -> None:
    train, tests = features(90, 0), {"a": features(60, 1), "b": features(45, 2)}
    subsets = draw_subsets(train.labels_N, [0.2, 1.0], 2)
    how = Scoring(recipe=QUICK)
    both = score(train, tests, subsets, how)
    assert [row.test for row in both] == ["a", "b"] * (2 * 3 * 2)
    for name, tiles in tests.items():
        for alone, beside in zip(
            score(train, {name: tiles}, subsets, how), [row for row in both if row.test == name], strict=True
        ):
            assert (alone.features, alone.classifier, alone.budget) == (
                beside.features,
                beside.classifier,
                beside.budget,
            )
            assert alone.right_SN.shape == beside.right_SN.shape == (2, len(tiles))
            np.testing.assert_array_equal(alone.right_SN, beside.right_SN)


def test_only_the_classifiers_asked_for_are_fitted() -> None:
    train = features(30, 0)
    subsets = draw_subsets(train.labels_N, [1.0], 1)
    rows = score(train, {"t": features(30, 1)}, subsets, Scoring(classifiers=[KNN]))
    assert [(row.features, row.classifier) for row in rows] == [("encoder", KNN), ("floor", KNN)]


def slides(seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Forty slides of one class each, told apart by a look of their own that says nothing about other slides."""
    generator = np.random.default_rng(seed)
    slide = np.repeat(np.arange(40), 10)
    labels = slide % 2
    looks = generator.normal(size=(40, 60))[slide]
    values = looks + 0.3 * generator.normal(size=(400, 60))
    values[:, 0] += 0.8 * labels
    return values.astype(np.float32), labels, [f"s{number}" for number in slide]


def test_whole_slides_choose_a_smaller_strength_than_tiles_of_the_same_slides() -> None:
    values, labels, groups = slides()
    assert choose_strength(values, labels, seed=0, groups=groups) < choose_strength(values, labels, seed=0)
    assert choose_strength(values, labels, seed=0, groups=[*groups[:-1], None]) < choose_strength(
        values, labels, seed=0
    ), "one tile without a slide: the others' slides are kept whole as before"


def test_where_no_whole_slide_can_be_held_out_the_default_stands() -> None:
    values, labels, _ = slides()
    assert choose_strength(values, labels, seed=0, groups=[f"class {label}" for label in labels]) == DEFAULT_STRENGTH
    assert choose_strength(values, labels, seed=0, groups=["one"] * 400) == DEFAULT_STRENGTH


def test_slides_reach_the_classifiers_through_the_rows() -> None:
    values, labels, groups = slides()
    tiles = Features({"encoder": values}, labels, np.arange(400), [b""] * 400)
    subsets = draw_subsets(labels, [1.0], 1, groups=groups)
    fast = replace(QUICK, optim=replace(QUICK.optim, lr=10.0))
    how = Scoring(strength="auto", classifiers=[LINEAR, SGD], recipe=fast)
    by_tile, by_slide = (score(tiles, {"t": tiles}, subsets, replace(how, groups=known)) for known in (None, groups))
    assert by_slide[0].settings[0]["C"] < by_tile[0].settings[0]["C"]
    assert by_slide[1].settings[0]["held_out"] % 10 == 0
    assert by_slide[1].settings[0]["epoch"] < by_tile[1].settings[0]["epoch"]


def test_folds_keep_slides_whole() -> None:
    _, labels, groups = slides()
    fold = slide_folds(labels, groups, 5, seed=1)
    assert sorted(set(fold.tolist())) == [0, 1, 2, 3, 4]
    assert len({(group, int(number)) for group, number in zip(groups, fold, strict=True)}) == 40
    assert set(slide_folds(labels, ["a"] * 200 + ["b"] * 200, 5, seed=1).tolist()) == {0, 1}


def test_every_other_row_is_compared_with_the_first_features() -> None:
    train, tests = features(90, 0, spread=1.0), {"a": features(60, 1, spread=1.0), "b": features(45, 2, spread=1.0)}
    rows = score(train, tests, draw_subsets(train.labels_N, [0.2, 1.0], 2), Scoring(recipe=QUICK))
    compared = compare_with_first(rows)
    assert [(c.against, c.classifier, c.budget, c.test) for c in compared] == [
        ("floor", classifier, budget, test)
        for classifier in (LINEAR, SGD, KNN)
        for budget in (0.2, 1.0)
        for test in ("a", "b")
    ]
    ours, theirs = (
        next(row for row in rows if row.features == name and (row.budget, row.test) == (1.0, "b"))
        for name in ("encoder", "floor")
    )
    found = next(c for c in compared if (c.budget, c.test) == (1.0, "b"))
    gain = ours.mean_sd("accuracy")[0] - theirs.mean_sd("accuracy")[0]
    assert found.difference.mean == pytest.approx(gain) and found.difference.p < 0.05
    assert found.difference.interval[0] > 0 and found.as_dict()["against"] == "floor"
    lines = differences("encoder", compared, name_tests=True).splitlines()
    assert lines[5].startswith(f"encoder less floor, linear, b, 100 % labels: {gain:+.3f} [")
    assert differences("encoder", [], name_tests=False) == ""
