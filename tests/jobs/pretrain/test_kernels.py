"""Budgets of a step on a GPU, counted without one (benchmarks.kernels)."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.kernels import bare_passes, count_step, parse, summarize
from ca2cl.config import ObjectiveConfig
from ca2cl.methods.ca2cl.method import CA2CL


@pytest.mark.parametrize("norm", ["sync", "lane_group"])
def test_a_step_on_eight_gpus_stays_within_its_budgets(norm: str) -> None:
    options = parse(["--batch", "224", "--processes", "8", "--norm", norm])
    counts, collectives = count_step(options)
    found = summarize(options, counts, collectives, bare_passes(options))
    step: dict[str, Any] = found["step"]
    assert step["launches"] <= (3_700 if norm == "sync" else 2_700)
    assert step["host_syncs"] == 1, counts.waits  # the step's numbers, which the loop reads a step late
    assert step["collectives"] <= (150 if norm == "sync" else 10)
    assert found["views"]["launches"] <= 40 and found["views"]["host_syncs"] == 0
    assert found["views"]["bytes"] <= 6e9 * 224 / 1792
    assert found["views"]["copies"] == 1  # the table, beside the tiles
    assert found["share"] >= 0.85


@pytest.mark.slow
def test_weight_1_launches_nothing_more_and_others_never_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    options = parse(
        ["--batch", "32", "--processes", "2", "--size", "32", "--arch", "timm:test_vit", "--precision", "no"]
    )
    plain, collectives = count_step(options)
    weighted, more_collectives = count_step(options, ObjectiveConfig(same_slide_weight=0.3))
    views = CA2CL.views
    monkeypatch.setattr(CA2CL, "views", lambda *args: views(*args)._replace(slides=None))
    without, _ = count_step(options)
    assert plain.total("launches") == without.total("launches") < weighted.total("launches")
    for what in ("host_syncs", "copies", "tile_copies"):
        assert weighted.total(what) == plain.total(what), weighted.waits
    assert plain.total("host_syncs") == 1 and more_collectives == collectives
