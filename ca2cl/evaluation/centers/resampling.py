"""Intervals over slides: of shares, balanced accuracies and medians.

Legend: N tiles, G groups (slides, patients or single tiles), T targets, R resamples.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ca2cl.evaluation.statistics import Interval, Units, ratio_score, score_interval

IntArray = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]
NONE: Interval = (float("nan"), float("nan"))
_RESAMPLES = 1000
_BLOCK_NUMBERS = 1_000_000


def share_interval(part_N: npt.NDArray[Any], whole_N: npt.NDArray[Any], units: Units) -> Interval:
    """95 % of sum(part) / sum(whole), by Student's t with the jackknife over groups, on the logit scale."""
    return _interval(part_N[:, None], whole_N[:, None], units)


def balanced_interval(right_N: npt.NDArray[np.bool_], target_N: IntArray, units: Units) -> Interval:
    """95 % of the mean over targets of the share of their tiles that is right, in the same way."""
    of_NT = np.eye(int(target_N.max()) + 1)[target_N]
    return _interval(of_NT * right_N[:, None], of_NT, units)


def _interval(part_NT: npt.NDArray[Any], whole_NT: npt.NDArray[Any], units: Units) -> Interval:
    return score_interval(ratio_score(_sums(part_NT, units), _sums(whole_NT, units)))


def _sums(values_NT: npt.NDArray[Any], units: Units) -> Numbers:
    """Over the tiles of each group, of a single draw: (1, G, T)."""
    columns = [np.bincount(units.unit_N, column, minlength=units.count) for column in values_NT.T]
    return np.stack(columns, axis=1)[None].astype(np.float64)


def median_interval(values_N: Numbers, units: Units, *, resamples: int = _RESAMPLES, seed: int = 0) -> Interval:
    """95 % of the median of the finite values (the lower one of two), by quantiles over resampled groups.

    The jackknife does not hold for a median.

    Args:
        values_N: ``nan`` for tiles without a value.
        units: groups that are drawn with replacement.
        resamples: samples of groups.
        seed: of the draws.
    """
    known = np.isfinite(values_N)
    if units.count < 2 or not known.any():
        return NONE
    order = np.flatnonzero(known)[np.argsort(values_N[known], kind="stable")]
    ordered_N, unit_N = values_N[order], units.unit_N[order]
    generator, found = np.random.default_rng(seed), []
    rows = max(1, _BLOCK_NUMBERS // max(len(order), units.count))
    for start in range(0, resamples, rows):
        times_RG = drawn(generator, min(rows, resamples - start), units.count)
        running_RN = times_RG[:, unit_N].cumsum(axis=1)
        place_R = (2 * running_RN < running_RN[:, -1:]).sum(axis=1)
        found.append(ordered_N[place_R[running_RN[:, -1] > 0]])
    low, high = np.quantile(np.concatenate(found), [0.025, 0.975])
    return float(low), float(high)


def drawn(generator: np.random.Generator, samples: int, groups: int) -> IntArray:
    """How often each sample holds each group, (samples, groups): as many draws as groups, with replacement."""
    drawn_RG = generator.integers(0, groups, (samples, groups))
    flat = (drawn_RG + groups * np.arange(samples)[:, None]).ravel()
    return np.bincount(flat, minlength=samples * groups).reshape(samples, groups).astype(np.int64)
