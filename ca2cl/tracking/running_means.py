"""Running means of a run's losses, for progress and curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ca2cl.common.records import is_number

SPAN = 20
"""About as many values make up a running mean."""
Panel = tuple[str, str, tuple[tuple[str, str], ...]]
"""Title, unit, and the journal's names with their labels."""


class RunningMean:
    """Mean of the last values, weighted by 1, k, k^2, ... backwards, with k = 1 - 2 / (span + 1).

    Args:
        span: number of plain values of which the mean would be as steady.
    """

    def __init__(self, span: int = SPAN) -> None:
        self._keep, self._sum, self._weight = 1 - 2 / (span + 1), 0.0, 0.0

    def add(self, value: float) -> None:
        """Take note of a value; one that is not finite is left out."""
        if math.isfinite(value):
            self._sum = self._keep * self._sum + value
            self._weight = self._keep * self._weight + 1

    @property
    def value(self) -> float:
        """The mean; ``nan`` before the first value."""
        return self._sum / self._weight if self._weight else math.nan


def smoothed(values_S: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The running mean after every value; ``nan`` where the value is not finite."""
    mean, found = RunningMean(), []
    for value in values_S.tolist():
        mean.add(value)
        found.append(mean.value if math.isfinite(value) else math.nan)
    return np.array(found, np.float64)


class LossMeter:
    """Running means of the terms of a loss, in words.

    Args:
        panels: charts of a method (``methods.base.Method.curves``); those with a unit are not of losses.
        chance: values of terms at chance (``methods.chance``).
    """

    def __init__(self, panels: Sequence[Panel], chance: Mapping[str, float]) -> None:
        named = {name: label or _lower(title) for title, unit, terms in panels if not unit for name, label in terms}
        self._labels, self._chance = named, chance
        self._means = {name: RunningMean() for name in named}

    def add(self, record: Mapping[str, Any]) -> None:
        """Take note of a journal line."""
        for name, mean in self._means.items():
            if is_number(record.get(name)):
                mean.add(float(record[name]))

    def text(self, most: int | None = None, digits: int = 3) -> str:
        """``loss 8.210, NT-Xent 4.013 (chance 4.84)``: the terms that had a value, at ``most`` so many."""
        known = {name: mean.value for name, mean in self._means.items() if not math.isnan(mean.value)}
        chance = {name: f" (chance {self._chance[name]:.2f})" for name in known if name in self._chance}
        words = [f"{self._labels[name]} {value:.{digits}f}{chance.get(name, '')}" for name, value in known.items()]
        return ", ".join(words[:most])


def _lower(title: str) -> str:
    """A title inside a sentence: Cluster loss, but NT-Xent."""
    return title[0].lower() + title[1:] if title[1:2].islower() else title
