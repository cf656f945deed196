"""Percentile intervals of ratios, medians and balanced accuracies by resampled slides.

Legend: N tiles, G groups (slides, patients or single tiles), R resamples, C targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ca2cl.evaluation.statistics import Interval

IntArray = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]
RESAMPLES = 1000
_BLOCK = 50
_BLOCK_DRAWS = 1_000_000
NONE: Interval = (float("nan"), float("nan"))


@dataclass(frozen=True)
class Resampled:
    """Samples of groups, drawn with replacement once and used for all statistics, so that these are paired.

    Args:
        unit_N: group of every tile, 0..G-1.
        stratum_G: groups are drawn from within these.
    """

    unit_N: IntArray
    stratum_G: IntArray | None = None
    resamples: int = RESAMPLES
    seed: int = 0

    @cached_property
    def times_RG(self) -> npt.NDArray[np.int16]:
        """How often each sample holds each group."""
        count = int(self.unit_N.max()) + 1
        strata_G = np.zeros(count, np.int64) if self.stratum_G is None else self.stratum_G
        times_RG = np.zeros((self.resamples, count), np.int16)
        generator = np.random.default_rng(self.seed)
        for stratum in np.unique(strata_G):
            inside = np.flatnonzero(strata_G == stratum)
            size = len(inside)
            rows = max(1, _BLOCK_DRAWS // size)
            for start in range(0, self.resamples, rows):
                drawn_BG = generator.integers(0, size, (min(rows, self.resamples - start), size))
                flat = (drawn_BG + size * np.arange(len(drawn_BG))[:, None]).ravel()
                times_RG[start : start + rows, inside] = np.bincount(flat, minlength=drawn_BG.size).reshape(-1, size)
        return times_RG

    def sums(self, values_N: npt.NDArray[Any]) -> Numbers:
        """Sum of a value over each sample's tiles, (R,)."""
        per_G = np.bincount(self.unit_N, values_N, minlength=self.times_RG.shape[1])
        return np.asarray(self.times_RG @ per_G, np.float64)

    def ratio(self, part_N: npt.NDArray[Any], whole_N: npt.NDArray[Any]) -> Interval:
        """Interval of sum(part) / sum(whole)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self._interval(self.sums(part_N) / self.sums(whole_N))

    def median(self, values_N: Numbers) -> Interval:
        """Interval of the median of the finite values (the lower one of two)."""
        known = np.isfinite(values_N)
        if not known.any():
            return NONE
        order = np.flatnonzero(known)[np.argsort(values_N[known], kind="stable")]
        ordered_N, unit_N = values_N[order], self.unit_N[order]
        found = []
        for start in range(0, self.resamples, _BLOCK):
            running_BN = self.times_RG[start : start + _BLOCK, unit_N].cumsum(axis=1, dtype=np.int64)
            place_B = (2 * running_BN < running_BN[:, -1:]).sum(axis=1)
            found.append(np.where(running_BN[:, -1] > 0, ordered_N[np.minimum(place_B, len(order) - 1)], np.nan))
        return self._interval(np.concatenate(found))

    def balanced(self, right_N: npt.NDArray[np.bool_], target_N: IntArray) -> Interval:
        """Interval of the mean over targets of the share of their tiles that is right; a target that a sample lacks
        is left out of its mean."""
        recalls = []
        with np.errstate(divide="ignore", invalid="ignore"):
            for target in np.unique(target_N):
                of_N = target_N == target
                recalls.append(self.sums(right_N & of_N) / self.sums(of_N))
        held_CR = np.isfinite(np.stack(recalls))
        total_R = np.where(held_CR, np.stack(recalls), 0.0).sum(axis=0)
        return self._interval(total_R / np.maximum(held_CR.sum(axis=0), 1))

    def _interval(self, found_R: Numbers, level: float = 0.95) -> Interval:
        finite = found_R[np.isfinite(found_R)]
        if self.times_RG.shape[1] < 2 or not len(finite):
            return NONE
        low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)
