"""How far a number may be off: the interval of an accuracy, and the interval and the test of a difference.

Tiles of one slide or patient are right or wrong together, and so are all tiles under one draw of labels. So what is
left out, and what is flipped, are whole slides and whole draws; single tiles only where no slide is known, and whoever
shows the numbers says so (``Units.statement``).

The percentile bootstrap of slides covers too little with the 30 to 50 that test sets have (.86 to .93 where .95 is
promised, ``python -m benchmarks.coverage``). The delete-one-slide jackknife (Tukey; CV3 of MacKinnon, Nielsen and Webb,
J. Appl. Econometrics 2023) with Student's t covers .91 and more.

Legend: S draws of labels (seeds), N test tiles, G groups: slides, patients or single tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
Interval = tuple[float, float]
_EXACT = 14
"""Most groups whose 2^G patterns of signs are all looked at."""
_BLOCK = 1000


@dataclass(frozen=True)
class Units:
    """What test tiles are resampled by: ``unit_N`` numbers each tile's slide or patient, 0..G-1."""

    unit_N: IntArray
    known: bool
    """Whether they are slides or patients; otherwise every tile is its own."""

    @classmethod
    def of(cls, slides: Sequence[str] | None, tiles: int) -> Units:
        """By the slide or patient of every tile (``data.splits.known_slides``); None where none is known."""
        if slides is None:
            return cls(np.arange(tiles), known=False)
        return cls(np.unique(np.asarray(slides, str), return_inverse=True)[1].astype(np.int64), known=True)

    @property
    def count(self) -> int:
        """G."""
        return int(self.unit_N.max()) + 1 if len(self.unit_N) else 0

    @property
    def name(self) -> str:
        """What a unit is, as MLflow and JSON have it."""
        return "slide or patient" if self.known else "tile"

    @property
    def statement(self) -> str:
        """What must stand beside every interval and p."""
        if self.known:
            return f"95 % and p: whole slides or patients were resampled ({self.count} of them), and label draws"
        return (
            "95 % and p: tiles were resampled; no slides known. Tiles of one slide are alike, so the intervals are too "
            "narrow unless every tile is of another slide"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"unit": self.name, "units": self.count, "statement": self.statement}


@dataclass(frozen=True)
class _Mean:
    """A mean over tiles and draws, its variance, and the degrees of freedom of that; ``nan`` with a single group."""

    value: float
    variance: float
    freedom: float
    draws_matter: bool
    """Whether draws of labels differ by more than the tiles that they are scored on explain."""

    def half_width(self, level: float) -> float:
        from scipy.stats import t

        return float(t.ppf((1 + level) / 2, self.freedom) * self.variance**0.5)

    @property
    def p(self) -> float:
        """Two-sided, of Student's t against 0."""
        from scipy.stats import t

        if not self.variance > 0:
            return 1.0
        return float(2 * t.sf(abs(self.value) / self.variance**0.5, self.freedom))


def _mean(values_SN: npt.NDArray[Any], units: Units) -> _Mean:
    """Slides and draws are crossed: the variance is that of slides, and of draws as far as it is more than what the
    slides make of it (as in Cameron, Gelbach and Miller's two-way clustering, J. Bus. Econ. Stat. 2011); its degrees of
    freedom are Satterthwaite's, those of slides by their effective number (sum n)^2 / sum n^2 (Kish)."""
    draws, tiles = values_SN.shape
    size_G = np.bincount(units.unit_N, minlength=units.count)
    rows = [np.bincount(units.unit_N, row, minlength=units.count) for row in values_SN.astype(np.float64)]
    sum_SG = np.stack(rows).astype(np.float64)
    total_G, value = sum_SG.mean(axis=0), float(values_SN.mean())
    if units.count < 2:
        return _Mean(value, float("nan"), float("nan"), False)
    without_G = (total_G.sum() - total_G) / (tiles - size_G)
    of_slides = (units.count - 1) / units.count * float(np.square(without_G - value).sum())
    of_draws = _variance_of_draws(sum_SG, size_G) if draws > 1 else 0.0
    variance = of_slides + of_draws
    effective = tiles**2 / float(np.square(size_G).sum())
    parts = of_slides**2 / max(1.0, effective - 1) + (of_draws**2 / (draws - 1) if of_draws else 0.0)
    return _Mean(value, variance, variance**2 / parts if parts else 1.0, of_draws > 0)


def _variance_of_draws(sum_SG: npt.NDArray[np.float64], size_G: IntArray) -> float:
    """Of the mean, by the draws; less what would be there if draws differed in nothing but single slides."""
    draws, tiles = len(sum_SG), int(size_G.sum())
    off_SG = sum_SG - sum_SG.mean(axis=0)
    off_S = off_SG.sum(axis=1)
    share_G = size_G / tiles
    alone_SG = off_SG - off_S[:, None] * share_G
    scale = tiles**2 * draws * (draws - 1)
    by_chance = np.square(alone_SG).sum() / (1 - np.square(share_G).sum())
    return max(0.0, float(np.square(off_S).sum() - by_chance) / scale)


def accuracy_interval(right_SN: BoolArray, units: Units | None = None, *, level: float = 0.95) -> Interval:
    """Interval of the accuracy, averaged over draws, for other slides and other draws of labels.

    Student's t on the logit scale: near 1 accuracies are skewed, and no interval leaves [0, 1]. Where all are right (or
    all wrong) nothing varies, and the open end is Clopper and Pearson's for G of G. ``nan`` for a single slide.

    Args:
        right_SN: whether draw s classified tile n correctly, shape (S, N).
        units: what tiles are resampled by; None takes single tiles.
    """
    units = units or Units.of(None, right_SN.shape[1])
    mean = _mean(right_SN, units)
    value, miss = mean.value, (1 - level) / 2
    if units.count < 2:
        return float("nan"), float("nan")
    if value in (0.0, 1.0):
        bound = miss ** (1 / units.count)
        return (bound, 1.0) if value == 1.0 else (0.0, 1 - bound)
    # no surer than if every prediction were of another slide
    variance = max(mean.variance, value * (1 - value) / right_SN.size)
    half = replace(mean, variance=variance).half_width(level) / (value * (1 - value))
    low, high = (_expit(np.log(value / (1 - value)) + side) for side in (-half, half))
    return low, high


def _expit(logit: float) -> float:
    return float(1 / (1 + np.exp(-logit)))


@dataclass(frozen=True)
class Difference:
    """How much more often A is right than B on the same test tiles."""

    mean: float
    """Accuracy of A less that of B, averaged over draws of labels."""
    interval: Interval
    """95 %, by Student's t, for other slides and other draws of labels."""
    only_a: int
    """Tiles, over all draws, that A alone got right."""
    only_b: int
    """Tiles, over all draws, that B alone got right."""
    p: float
    """Two-sided, of the test that flips the sign of whole slides' differences."""
    p_holm: float = float("nan")
    """The same, corrected by Holm for all comparisons that are shown together."""


def paired_difference(
    a_SN: BoolArray, b_SN: BoolArray, units: Units | None = None, *, resamples: int = 10_000, seed: int = 0
) -> Difference:
    """Compare two classifiers tile by tile.

    p is that of ``sign_flip_p``; where draws of labels differ by more than their slides explain it is not below that of
    Student's t over slides and draws: flipping slides alone would take five lucky draws for certain.

    Args:
        a_SN, b_SN: whether draw s of either classified tile n correctly, shape (S, N); the same tiles in one order.
        units: what tiles are resampled by; None takes single tiles.
        resamples, seed: of the flips, where they are drawn.

    Raises:
        ValueError: shapes that differ, or no tiles.
    """
    if a_SN.shape != b_SN.shape or a_SN.size == 0:
        raise ValueError(f"A is {a_SN.shape} and B is {b_SN.shape}: compare the same seeds on the same tiles")
    units = units or Units.of(None, a_SN.shape[1])
    gain_SN = a_SN.astype(np.int64) - b_SN
    mean = _mean(gain_SN, units)
    half = mean.half_width(0.95)
    sums_G = np.bincount(units.unit_N, gain_SN.sum(axis=0), minlength=units.count).round().astype(np.int64)
    p = sign_flip_p(sums_G, flips=resamples, seed=seed)
    return Difference(
        mean=mean.value,
        interval=(max(-1.0, mean.value - half), min(1.0, mean.value + half)),
        only_a=int((gain_SN > 0).sum()),
        only_b=int((gain_SN < 0).sum()),
        p=max(p, mean.p) if mean.draws_matter else p,
    )


def sign_flip_p(sums_G: IntArray, *, flips: int = 10_000, seed: int = 0) -> float:
    """Two-sided p of the sign-flip (paired permutation) test: were A and B alike, a slide's difference would be as
    likely of the other sign.

    Valid whatever the slides' sizes and however alike their tiles are (Fisher's randomisation test; with one tile a
    slide and one draw it is McNemar's exact test). All 2^G patterns up to 14 slides that differ; otherwise ``flips``
    drawn ones, counted with the observed one (Phipson and Smyth, 2010), so that p is never 0.

    Args:
        sums_G: right predictions of A less those of B, summed over a slide's tiles and over draws.
    """
    from scipy.stats import binomtest

    sums_G = sums_G[sums_G != 0]
    observed = abs(int(sums_G.sum()))
    sizes_L, counts_L = np.unique(np.abs(sums_G), return_counts=True)
    if not len(sums_G):
        return 1.0
    if len(sizes_L) == 1:
        return float(binomtest(int((sums_G > 0).sum()), len(sums_G)).pvalue)
    if len(sums_G) <= _EXACT:
        signs_FG = 1 - 2 * ((np.arange(2 ** len(sums_G))[:, None] >> np.arange(len(sums_G))) & 1)
        return float((np.abs(signs_FG @ sums_G) >= observed).mean())
    generator = np.random.default_rng(seed)
    as_far = 0
    for start in range(0, flips, _BLOCK):
        # of equal sizes only the number of pluses matters
        plus_FL = generator.binomial(counts_L, 0.5, size=(min(_BLOCK, flips - start), len(counts_L)))
        as_far += int((np.abs((2 * plus_FL - counts_L) @ sizes_L) >= observed).sum())
    return (as_far + 1) / (flips + 1)


def holm(differences: Sequence[Difference]) -> list[Difference]:
    """The same with ``p_holm``, Holm's step-down correction (1979) over all of them: the chance that any of them is
    called real by accident stays below the level, however they depend on one another."""
    order = np.argsort([difference.p for difference in differences], kind="stable")
    found = list(differences)
    highest = 0.0
    for place, number in enumerate(order.tolist()):
        highest = max(highest, min(1.0, (len(found) - place) * found[number].p))
        found[number] = replace(found[number], p_holm=highest)
    return found
