"""Calibration of a result row, raw and temperature-scaled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ca2cl.evaluation.calibration.probability_errors import ERRORS, CalibrationErrors
from ca2cl.evaluation.calibration.reliability import Bin

SCALED = "scaled_"
"""Prefix of the errors of scaled probabilities."""


@dataclass(frozen=True)
class Calibration:
    """Errors of the probabilities of every draw, and reliability over all of them."""

    raw: list[CalibrationErrors]
    raw_bins: list[Bin]
    temperatures: list[float]
    """One a draw; empty where a draw had no held-out tiles to choose one by."""
    scaled: list[CalibrationErrors]
    """Empty without temperatures."""
    scaled_bins: list[Bin]

    def errors(self) -> dict[str, list[float]]:
        """Every error by name, one value a draw, and the temperatures."""
        found = {name: [getattr(one, name) for one in self.raw] for name in ERRORS}
        if self.scaled:
            found |= {SCALED + name: [getattr(one, name) for one in self.scaled] for name in ERRORS}
            found["temperature"] = list(self.temperatures)
        return found

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def of(cls, held: Mapping[str, Any]) -> Calibration:
        """What ``as_dict`` wrote; null is ``nan`` again.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        return cls(
            raw=_errors(held["raw"]),
            raw_bins=_bins(held["raw_bins"]),
            temperatures=[float(one) for one in held["temperatures"]],
            scaled=_errors(held["scaled"]),
            scaled_bins=_bins(held["scaled_bins"]),
        )


def _errors(held: Sequence[Mapping[str, Any]]) -> list[CalibrationErrors]:
    return [CalibrationErrors(**{name: float(one[name]) for name in ERRORS}) for one in held]


def _bins(held: Sequence[Mapping[str, Any]]) -> list[Bin]:
    numbers = ("confidence", "accuracy", "low", "high")
    return [
        Bin(int(one["number"]), int(one["count"]), *(math.nan if one[n] is None else float(one[n]) for n in numbers))
        for one in held
    ]
