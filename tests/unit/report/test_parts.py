"""The parts of a report against slow loops: tiles drawn, neighbours, clusters, map, curves, a probe's rows."""

from __future__ import annotations

import base64
import io
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ca2cl.evaluation.clusters import cluster
from ca2cl.evaluation.features import centred
from ca2cl.evaluation.probe.scoring import Scoring, score
from ca2cl.evaluation.report import cells, row_as_dict, row_from_dict
from ca2cl.evaluation.splits import draw_subsets, stratified_sample
from ca2cl.methods.base import Method
from ca2cl.methods.ca2cl.method import CA2CL
from ca2cl.report.curves import counts, panels
from ca2cl.report.embedding_map import draw_map
from ca2cl.report.images import CELL, layout, sprites
from ca2cl.report.material import RunMaterial
from ca2cl.report.neighbours import draw_queries, nearest, precision
from tests.unit.evaluation.probe.test_report import made_up


def clouds(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit features in three loose clouds, and their labels."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    drawn = (generator.normal(size=(count, 6)) + 2 * np.eye(3, 6)[labels]).astype(np.float32)
    return np.asarray(centred(drawn.astype(np.float64))[0], np.float64), labels


@pytest.mark.parametrize(("count", "expected"), [(3, [1, 1, 1]), (10, [5, 3, 2]), (200, [60, 30, 10])])
def test_a_sample_has_every_label_with_its_share(count: int, expected: list[int]) -> None:
    labels = np.repeat([-1, 0, 5], [60, 30, 10])
    drawn = stratified_sample(labels, count, seed=3)
    assert len(drawn) == min(count, 100) == len(set(drawn.tolist())) and (np.diff(drawn) > 0).all()
    held = Counter(labels[drawn].tolist())
    assert all(abs(held[label] - wanted) <= 1 for label, wanted in zip((-1, 0, 5), expected, strict=True)), held
    assert (stratified_sample(labels, count, seed=3) == drawn).all()
    if count == 10:
        assert (stratified_sample(labels, count, seed=4) != drawn).any()


def test_neighbours_are_a_slow_loops() -> None:
    features, labels = clouds(40)
    found, cosines = nearest(features, 8)
    shares = []
    for row in range(40):
        others = [other for other in range(40) if other != row]
        told = {other: round(math.fsum(features[row] * features[other]), 9) for other in others}
        wanted = sorted(others, key=lambda other: (-told[other], other))[:8]
        assert found[row].tolist() == wanted
        assert cosines[row] == pytest.approx([told[other] for other in wanted], abs=2e-9)
        shares.append(sum(labels[other] == labels[row] for other in wanted) / 8)
    assert precision(found, labels) == pytest.approx(sum(shares) / 40)


def test_equally_near_tiles_come_in_their_order_and_never_the_tile_itself() -> None:
    features = np.tile(np.full((1, 4), 0.5), (5, 1))
    assert nearest(features, 8)[0].tolist() == [[o for o in range(5) if o != row] for row in range(5)]
    assert nearest(features[:1], 8)[0].shape == (1, 0)


def test_what_all_tiles_share_does_not_make_them_alike() -> None:
    drawn = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    (plain,), (moved,) = centred(drawn.astype(np.float64)), centred((drawn + 100).astype(np.float64))
    assert moved == pytest.approx(plain, abs=1e-4)
    assert np.median(moved @ moved.T) < 0.5


def test_unlabelled_neighbours_do_not_count() -> None:
    found = np.array([[1, 2], [0, 2], [0, 1]])
    assert precision(found, np.array([0, 0, -1])) == 1
    assert precision(found, np.array([0, 1, -1])) == 0
    assert precision(found, np.array([0, -1, -1])) is None


def test_queries_are_several_of_every_class_and_not_without_end() -> None:
    labels = np.arange(90) % 9
    assert Counter(labels[draw_queries(labels, 0)].tolist()) == dict.fromkeys(range(9), 3)
    many = np.arange(400) % 200
    assert len(draw_queries(many, 0)) == 60
    assert len(draw_queries(np.full(50, -1), 0)) == 12
    assert draw_queries(labels, 0).tolist() != draw_queries(labels, 1).tolist()


def test_clusters_purity_and_mutual_information_are_a_slow_loops() -> None:
    features, labels = clouds(60)
    labels[::7] = -1
    found = cluster(features, labels, 4, seed=0)
    sizes = [len(part.rows) for part in found.clusters]
    assert sum(sizes) == 60 and sizes == sorted(sizes, reverse=True)
    right = 0
    for part in found.clusters:
        members = [row for row in range(60) if found.assignments_N[row] == part.number]
        centroid = sum(features[row] for row in members) / len(members)
        distances = {row: math.fsum((features[row] - centroid) ** 2) for row in members}
        assert set(part.rows.tolist()) == set(members)
        told = [distances[row] for row in part.rows.tolist()]
        assert all(a <= b + 1e-12 for a, b in zip(told, told[1:], strict=False))
        held = [int(labels[row]) for row in members if labels[row] >= 0]
        most = max(held.count(label) for label in held)
        assert part.purity == pytest.approx(most / len(held)) and held.count(part.label) == most
        right += most
    known = [row for row in range(60) if labels[row] >= 0]
    assert found.purity == pytest.approx(right / len(known))
    assert found.nmi == pytest.approx(mutual_information([(labels[r], found.assignments_N[r]) for r in known]))


def mutual_information(pairs: list[tuple[int, int]]) -> float:
    """2 I(a, b) / (H(a) + H(b)), by counting."""
    total = len(pairs)

    def entropy(counted: Counter) -> float:
        return -sum(n / total * math.log(n / total) for n in counted.values())

    first, second = (Counter(pair[side] for pair in pairs) for side in (0, 1))
    shared = entropy(first) + entropy(second) - entropy(Counter(pairs))
    return 2 * shared / (entropy(first) + entropy(second))


def test_without_labels_there_is_no_purity_and_few_tiles_make_few_clusters() -> None:
    features, _ = clouds(3)
    found = cluster(features, np.full(3, -1), 10, seed=0)
    assert len(found.clusters) == 3
    assert found.purity is found.nmi is found.clusters[0].purity is found.clusters[0].label is None


@pytest.mark.parametrize(("count", "islands"), [(1, False), (2, False), (9, False), (10, True), (60, True)])
def test_a_map_is_a_function_of_features_and_seed_and_lies_in_its_square(count: int, islands: bool) -> None:
    features, _ = clouds(count)
    found = draw_map(features, seed=1)
    assert found.xy_N2.shape == (count, 2) and found.islands == islands
    assert found.xy_N2.min() >= 0 and found.xy_N2.max() <= 1
    assert (draw_map(features, seed=1).xy_N2 == found.xy_N2).all()
    if count == 60:
        assert "seed 1" in found.method and "perplexity 19.7" in found.method


def test_equal_tiles_have_a_map() -> None:
    found = draw_map(np.tile(np.full((1, 4), 0.5), (20, 1)), seed=0)
    assert np.isfinite(found.xy_N2).all() and not found.islands


def test_sprites_hold_every_tile_where_the_page_looks_for_it() -> None:
    tones = np.arange(510) % 250
    thumbs = np.broadcast_to(tones[:, None, None, None].astype(np.uint8), (510, 96, 96, 3))
    sheets = sprites(np.ascontiguousarray(thumbs))
    assert [sheet.tiles for sheet in sheets] == [500, 10]
    images = [Image.open(io.BytesIO(base64.b64decode(sheet.uri.partition(",")[2]))) for sheet in sheets]
    where = layout()
    for tile in (0, 24, 25, 499, 500, 509):
        top, left = (CELL * part for part in divmod(tile % where["each"], where["columns"]))
        cell = np.asarray(images[tile // where["each"]])[top : top + CELL, left : left + CELL]
        assert np.abs(cell.astype(int) - tones[tile]).max() <= 3


def test_relative_paths_are_those_of_the_folder_that_a_run_was_started_in(tmp_path: Path) -> None:
    folder = tmp_path / "work" / "runs" / "a"
    folder.mkdir(parents=True)

    def bases(told: str) -> list[Path]:
        return RunMaterial(run_id="", name="", status="", params={"run.output_dir": told}, folder=folder).bases()[1:]

    assert bases("runs/a") == [tmp_path / "work"] and bases("a") == [tmp_path / "work" / "runs"]
    assert bases("runs/b") == bases(str(folder)) == bases("") == []


def test_curves_break_where_a_number_was_not_finite_and_say_where_they_end() -> None:
    lines = [{"step": step, "loss": None if step == 3 else 4.0 / step, "lr": 0.1} for step in range(1, 6)]
    loss, lr = panels(lines, CA2CL)
    assert (loss.title, lr.title) == ("Loss", "Learning rate")
    (curve,) = loss.curves
    assert curve.path.count("M") == 2 and curve.path.count("L") == 2 and len(curve.dots) == 4
    assert curve.mean.count("M") == 2 and curve.mean != curve.path
    assert curve.last == "1.82" and "Loss running mean ends at 1.82" in loss.description
    assert loss.chance is None and lr.curves[0].mean == ""
    heights = [y for _, y in curve.dots]
    assert heights == sorted(heights)  # the loss falls, and a page counts from its top
    assert len({y for _, y in lr.curves[0].dots}) == 1
    assert len(panels([{"step": 1, "loss": math.inf}], Method)) == 0


def test_chance_is_a_line_inside_the_panel() -> None:
    lines = [{"step": step, "loss": 9.0, "nt_xent": 4.0} for step in range(1, 4)]
    loss, contrast = panels(lines, CA2CL, chance={"nt_xent": 4.8442})
    assert loss.chance is None and contrast.chance is not None
    place, told = contrast.chance
    assert told == "4.84" and contrast.description.endswith("; chance is 4.84")
    assert 0 < place < min(y for _, y in contrast.curves[0].dots), "above the loss, inside the panel"


def test_a_long_run_is_thinned() -> None:
    (loss,) = panels([{"step": step, "loss": 1 / (1 + step)} for step in range(5000)], Method)
    assert 300 < loss.curves[0].path.count("L") < 500 and not loss.curves[0].dots


def test_what_went_wrong_is_the_journals_running_total() -> None:
    lines = [
        {"step": 1, "bad_samples": 2, "skipped_steps": 0},
        {"step": 2, "bad_samples": 1234567.0, "skipped_steps": 0.0},
    ]
    assert counts(lines, CA2CL) == ["1234567 undecodable tiles replaced"] and counts([], CA2CL) == []


NEWER = {"calibration", "recalls", "intervals_95"}
"""Not in the JSON of earlier versions."""


def test_a_probes_rows_come_back_from_its_json() -> None:
    train, test = made_up(60, 0), made_up(30, 1)
    subsets = draw_subsets(train.labels_N, [0.5], seeds=2)
    rows = score(train, {"test": test}, subsets, Scoring(k=5))
    assert [row.classifier for row in rows] == 2 * ["linear", "linear SGD", "k-NN"]
    for row in rows:
        again = row_from_dict(row_as_dict(row), row.test)
        assert cells(again) == cells(row) and (again.confusion == row.confusion).all()
        assert again.settings == row.settings
        assert json.dumps(row_as_dict(again)) == json.dumps(row_as_dict(row)), "calibration, recalls and intervals too"
    earlier = {name: held for name, held in row_as_dict(rows[0]).items() if name not in NEWER}
    assert cells(row_from_dict(earlier)) == cells(rows[0]) and row_from_dict(earlier).calibration is None
    undefined = row_as_dict(rows[0])
    undefined["seeds"][0]["macro_auroc"] = None
    assert "undefined" in cells(row_from_dict(undefined))
