"""RI, MaRI and CRoMa: against slow loops, numbers of the package croma, and planted centres."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from ca2cl.evaluation.centers.indices import indices, margins
from ca2cl.evaluation.centers.typed_neighbours import typed_neighbours
from ca2cl.evaluation.statistics import Units

Numbers = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class Tiles(NamedTuple):
    values: Numbers
    labels: Integers
    centers: Integers
    groups: Integers


def planted(seed: int, count: int = 120, reach: float = 1.0, classes: int = 3, centers: int = 2) -> Tiles:
    """Features with a part for the class, and one for the centre of length ``reach``; eight slides a centre."""
    generator = np.random.default_rng(seed)
    labels, center = generator.integers(0, classes, count), generator.integers(0, centers, count)
    groups = 8 * center + generator.integers(0, 8, count)
    of_class, of_center = generator.normal(size=(classes, 12)), generator.normal(size=(centers, 12))
    values = 2 + of_class[labels] + reach * of_center[center] + generator.normal(size=(count, 12))
    return Tiles(values, labels, center, groups)


def distance(a: Numbers, b: Numbers) -> float:
    return 1 - float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def loop(tiles: Tiles, k: int, m: int) -> tuple[float, float, float]:
    """RI, MaRI and CRoMa of arXiv 2507.17845 and 2607.25497, one tile after another."""
    same, other, margin = [], [], []
    for i, (value, label, center, group) in enumerate(zip(*tiles, strict=True)):
        others = [j for j in range(len(tiles.labels)) if tiles.groups[j] != group and j != i]
        ranked = sorted((distance(value, tiles.values[j]), j) for j in others)
        kinds = [(d, tiles.labels[j] == label, tiles.centers[j] == center) for d, j in ranked]
        same += [d for d, of_class, of_center in kinds[:k] if of_class and not of_center]
        other += [d for d, of_class, of_center in kinds[:k] if of_center and not of_class]
        near = [d for d, of_class, of_center in kinds if of_class and not of_center][:m]
        far = [d for d, of_class, of_center in kinds if of_center and not of_class][:m]
        margin.append((sum(far) - sum(near)) / (sum(far) + sum(near)))
    tau = sorted(same + other)
    half = (tau[len(tau) // 2] + tau[(len(tau) - 1) // 2]) / 2
    weigh = [sum(math.exp(-d / half) for d in distances) for distances in (same, other)]
    return len(same) / len(same + other), weigh[0] / sum(weigh), float(np.median(margin))


@pytest.mark.parametrize("seed", range(3))
def test_the_indices_are_those_of_a_slow_loop(seed: int) -> None:
    tiles = planted(seed)
    found = indices(*tiles, candidates=(7,), m=3)
    assert (found.ri, found.mari, found.croma) == pytest.approx(loop(tiles, 7, 3), abs=1e-12)


@pytest.mark.parametrize(
    ("seed", "classes", "centers", "expected"),
    [
        (
            0,
            3,
            2,
            (
                21,
                0.1506276150627615,
                0.12605908603485202,
                -0.20607179584747823,
                -0.518670265210221,
                0.8666666666666667,
                0.10136754017941274,
                0.76,
            ),
        ),
        (
            1,
            4,
            3,
            (
                11,
                0.15384615384615385,
                0.14407766154724405,
                -0.2619313576240636,
                -0.57792740238711,
                0.87,
                0.07023599585319207,
                0.97,
            ),
        ),
    ],
)
def test_the_indices_are_those_that_croma_printed(
    seed: int, classes: int, centers: int, expected: tuple[float, ...]
) -> None:
    """croma 1.0.1 on the same vectors: k, RI, MaRI, CRoMa, LTM10, F0, tau and support."""
    found = indices(*planted(seed, 300, 1.0, classes, centers))
    ours = (found.k, found.ri, found.mari, found.croma, found.croma_tail, found.center_nearer, found.tau, found.support)
    assert ours == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("reach", [0.0, 0.7, 2.0])
def test_the_indices_are_croma_s(reach: float) -> None:
    """The package itself, where it is installed."""
    croma = pytest.importorskip("croma")
    pandas = pytest.importorskip("pandas")
    tiles = planted(7, 400, reach, 5, 3)
    rows = {"label": tiles.labels, "group_id": tiles.groups, "center": tiles.centers}
    table = pandas.DataFrame({name: values.astype(str) for name, values in rows.items()})
    table["sample_id"] = table["image_path"] = [f"t{n}" for n in range(len(table))]
    how = {"confounder_column": "center", "k_candidates": [5, 11, 21]}
    ri = croma.RI.compute(tiles.values, table, **how)
    mari = croma.MaRI.compute(tiles.values, table, **how)
    margin = croma.CRoMa.compute(tiles.values, table, confounder_column="center")
    found = indices(*tiles)
    assert found.k == ri.k
    ours = (found.ri, found.mari, found.croma, found.croma_tail, found.center_nearer, found.tau, found.support)
    theirs = (ri.value, mari.value, margin.value, margin.ltm_alpha, margin.f0, mari.tau, ri.support)
    assert ours == pytest.approx(theirs, abs=1e-9)
    near = typed_neighbours(*tiles, k=5, m=5)
    assert margins(near) == pytest.approx(margin.sample_values_aligned, abs=1e-9)


def test_a_stronger_mark_of_the_centre_lowers_all_three() -> None:
    found = [indices(*planted(3, 400, reach)) for reach in (0.0, 0.5, 1.0, 2.0, 4.0)]
    for name in ("ri", "mari", "croma"):
        values = [getattr(one, name) for one in found]
        assert values == sorted(values, reverse=True) and values[0] > values[-1] + 0.2
    assert found[-1].ri < 0.1 and found[-1].croma < 0


def test_intervals_hold_their_numbers() -> None:
    tiles = planted(4, 400)
    found = indices(*tiles, units=Units(tiles.groups, known=True))
    for value, (low, high) in (
        (found.ri, found.ri_interval_95),
        (found.mari, found.mari_interval_95),
        (found.croma, found.croma_interval_95),
    ):
        assert low < value < high


def test_tiles_of_the_own_slide_are_no_neighbours() -> None:
    tiles = planted(5)
    found = typed_neighbours(*tiles, k=11, m=3)
    assert (tiles.groups[found.index_NK] != tiles.groups[:, None]).all()


def test_what_cannot_be_scored_is_counted() -> None:
    tiles = planted(6, 200, classes=3)
    labels = np.where(tiles.centers == 0, 0, 1 + tiles.labels % 2)
    alone = indices(tiles.values, labels, tiles.centers, tiles.groups)
    assert math.isnan(alone.croma) and alone.croma_support == 0, "no class is in both centres"
    same_class = indices(tiles.values, np.zeros_like(labels), tiles.centers, tiles.groups)
    assert same_class.ri == 1.0 and math.isnan(same_class.croma), "no other class"
    same = indices(np.ones_like(tiles.values), tiles.labels, tiles.centers, tiles.groups)
    assert math.isnan(same.croma) and same.tau == 0.2, "all distances are 0"
    with pytest.raises(ValueError, match="4 tiles"):
        indices(*(part[:4] for part in tiles))  # type: ignore[arg-type]
