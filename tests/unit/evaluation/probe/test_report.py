"""Rows, table, JSON and confusion matrix of a probe, from made-up features."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from ca2cl.errors import InputError
from ca2cl.evaluation.features import Features
from ca2cl.evaluation.probe.scoring import Scoring, score
from ca2cl.evaluation.report import (
    cells,
    describe_draws,
    draw_confusion,
    row_as_dict,
    table,
    tracked_metrics,
    write_json,
)
from ca2cl.evaluation.result import Row
from ca2cl.evaluation.splits import draw_subsets


def made_up(count: int, seed: int) -> Features:
    """Clear clouds as ``encoder``, noise as ``floor``."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    noise = generator.normal(size=(2, count, 6)).astype(np.float32)
    clouds = noise[0] + 4 * np.eye(3, 6, dtype=np.float32)[labels]
    samples = np.arange(count, dtype=np.int64)
    return Features({"encoder": clouds, "floor": noise[1]}, labels, samples, [b""] * count)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    train, test = made_up(90, 0), made_up(60, 1)
    return score(
        train, {"test": test}, draw_subsets(train.labels_N, [1.0, 0.1, 8.0], seeds=3), Scoring(strength="auto")
    )


def test_there_is_a_row_for_all_features_classifiers_and_budgets(rows: list[Row]) -> None:
    assert [(r.features, r.classifier, r.budget) for r in rows] == [
        (features, classifier, budget)
        for features in ("encoder", "floor")
        for classifier in ("linear", "linear SGD", "k-NN")
        for budget in (0.1, 8.0, 1.0)
    ]
    assert [r.labelled for r in rows[:3]] == [9, 24, 90]


def test_signal_is_told_from_noise(rows: list[Row]) -> None:
    for row in rows:
        mean, _ = row.mean_sd("accuracy")
        assert row.interval[0] <= mean <= row.interval[1]
        assert mean > 0.8 if row.features == "encoder" else mean < 0.6


def test_rows_are_a_function_of_their_input() -> None:
    train, test = made_up(90, 0), made_up(60, 1)
    subsets = draw_subsets(train.labels_N, [0.1, 8.0], seeds=2)
    first, again = (score(train, {"test": test}, subsets, Scoring(strength="auto")) for _ in range(2))
    assert json.dumps([row_as_dict(row) for row in again]) == json.dumps([row_as_dict(row) for row in first])


def test_all_labels_leave_no_spread_to_the_neighbours_and_few_labels_do(rows: list[Row]) -> None:
    knn = [row for row in rows if (row.features, row.classifier) == ("floor", "k-NN")]
    assert knn[2].mean_sd("accuracy")[1] == 0
    assert knn[0].mean_sd("accuracy")[1] > 0
    assert knn[0].settings == [{"k": 9.0}] * 3


def test_the_table_is_aligned_and_names_its_scores(rows: list[Row]) -> None:
    lines = table(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    for word in ("top-1 accuracy", "balanced acc.", "macro F1", "macro AUROC"):
        column = lines[0].index(word)
        assert all(line[column - 1] == " " and line[column] != " " for line in lines[2:]), word
    mean, sd = rows[0].mean_sd("macro_f1")
    assert f"{mean:.3f} ± {sd:.3f}" in lines[2]
    assert "8/class" in lines[3] and "100 %" in lines[4]


def test_json_is_strict_and_holds_every_seed(rows: list[Row], tmp_path: Path) -> None:
    path = tmp_path / "new" / "probe.json"
    write_json(path, {"results": [row_as_dict(row) for row in rows], "undefined": math.nan})

    def refuse(text: str) -> None:
        raise AssertionError(text)

    content = json.loads(path.read_text(), parse_constant=refuse)
    assert content["undefined"] is None
    first = content["results"][0]
    assert first["mean"]["accuracy"] == pytest.approx(np.mean([seed["accuracy"] for seed in first["seeds"]]))
    assert np.array(first["seeds"][2]["confusion"]).sum() == 60
    assert [p.name for p in path.parent.iterdir()] == ["probe.json"]


def test_an_unwritable_output_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="probe.json: cannot be written .*give a file in a folder you can write"):
        write_json(tmp_path / "file" / "probe.json", {})


def test_the_confusion_matrix_is_drawn(rows: list[Row], tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "confusion.png"
    title = "encoder, linear, 472 labelled tiles: % of each label's tiles"
    draw_confusion(path, rows[0].confusion, ["A", "B", "C"], title)
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) > 300
    assert (pixels[:60, -3:] == 255).all() and (pixels[:60, :3] == 255).all()  # the title is whole
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def test_metrics_for_tracking_are_finite_and_named_by_row(rows: list[Row]) -> None:
    metrics = tracked_metrics(rows)
    assert metrics["encoder/linear/10pct/accuracy"] == rows[0].mean_sd("accuracy")[0]
    assert metrics["floor/k-NN/8_per_class/accuracy_low"] == rows[16].interval[0]
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["floor/k-NN/8_per_class/brier_high"] == rows[16].intervals["brier"][1]
    scaled = sum(row.calibration is not None and bool(row.calibration.scaled) for row in rows)
    scores, errors = 6, 4  # each with its sd; four scores and two errors with an interval
    assert len(metrics) == len(rows) * 2 * (scores + errors + 4 + 2) + scaled * 2 * (errors + 1 + 2)


def test_no_spread_is_shown_where_there_is_one_draw(rows: list[Row]) -> None:
    """All labels are the same tiles every time, but training on them need not end the same."""
    everything = [row for row in rows if row.budget == 1.0]
    shown = {(row.features, row.classifier): cells(row)[4] for row in everything}
    assert all("±" not in shown[name, kind] for name in ("encoder", "floor") for kind in ("linear", "k-NN"))
    (trained,) = (row for row in everything if (row.features, row.classifier) == ("floor", "linear SGD"))
    assert trained.mean_sd("accuracy")[1] > 0 and "±" in shown["floor", "linear SGD"]
    assert all("±" in cells(row)[4] for row in rows if row.budget != 1.0)
    assert (describe_draws(1), describe_draws(5)) == ("one draw of labels", "mean ± sd over 5 draws of labels")
