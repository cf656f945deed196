"""Limits of what is dropped from a mask as stray pixels."""

from __future__ import annotations

from dataclasses import dataclass

from annotated_types import Ge, Interval

from ca2cl.common.ranges import check_ranges


@dataclass(frozen=True)
class FragmentRule:
    """Limits below which instances and fragments are dropped."""

    min_area: int = 64
    """Pixels; at 20x about 25 square micrometres, less than one nucleus."""
    max_loss: float = 0.01
    """Share of an instance's pixels that may be dropped with its fragments."""

    def __post_init__(self) -> None:
        check_ranges(self, min_area=Ge(0), max_loss=Interval(ge=0, lt=1))
