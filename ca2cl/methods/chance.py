"""Values of loss terms for embeddings that tell nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ca2cl.config import ObjectiveConfig
from ca2cl.methods.base import Method


def chance_levels(method: type[Method], settings: Mapping[str, Any]) -> dict[str, float]:
    """Terms of a run by name, where the value at chance is exact; none where the settings do not say.

    Args:
        method: the run's.
        settings: by dotted name, as values or, as MLflow has them, as texts.
    """
    micro = str(settings.get("run.micro_batch_size"))
    if settings.get("run.accumulation") == "plain" and micro not in ("None", ""):
        return {}  # each micro-batch has negatives of its own
    try:
        tiles = int(settings["run.batch_size"])
        weight = float(settings.get("objective.same_slide_weight", 1))
    except (KeyError, ValueError):
        return {}
    return dict(method.chance(ObjectiveConfig(same_slide_weight=weight), tiles))
