"""The schedules of ``ca2cl detect`` are those of the authors' detection configurations."""

from __future__ import annotations

from typing import Any

import pytest

from ca2cl.detection.train.config import DetectConfig


def schedule(dataset: Any, **given: Any) -> tuple[int, tuple[int, ...], int, int, int, int]:
    found = DetectConfig(encoder="random", dataset=dataset, data="d", output_dir="o", **given).schedule(0)
    sides = found.train_sides
    assert sorted(set(sides)) == list(sides)
    return found.iterations, found.milestones, found.warmup, sides[0], sides[-1], found.test_side


@pytest.mark.parametrize(
    ("dataset", "given", "expected"),
    [
        ("glas", {}, (5_000, (4_000,), 1_000, 400, 522, 522)),
        ("glas", {"times": 2}, (10_000, (8_000,), 1_000, 400, 522, 522)),
        ("crag", {}, (15_000, (10_000, 13_000), 1_000, 768, 1_024, 768)),
        ("crag", {"times": 0.5}, (7_500, (5_000, 6_500), 1_000, 768, 1_024, 768)),
        ("coco", {}, (90_000, (60_000, 80_000), 1_000, 640, 800, 800)),
        ("glas", {"iterations": 100, "test_side": 200}, (100, (80,), 20, 400, 522, 200)),
        ("glas", {"train_sides": (176, 208)}, (5_000, (4_000,), 1_000, 176, 208, 522)),
    ],
)
def test_steps_milestones_warmup_and_sides(dataset: str, given: dict[str, Any], expected: tuple[Any, ...]) -> None:
    assert schedule(dataset, **given) == expected


def test_every_side_of_a_range_is_as_likely() -> None:
    for dataset, sides in (("glas", range(400, 523)), ("crag", range(768, 1_025))):
        config = DetectConfig(encoder="random", dataset=dataset, data="d", output_dir="o")  # type: ignore[arg-type]
        assert config.schedule(0).train_sides == tuple(sides)
