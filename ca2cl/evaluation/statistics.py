"""Confidence intervals and paired tests that resample slides.

Tiles of one slide or patient are right or wrong together, and so are all tiles under one draw of labels. So what is
left out, and what is flipped, are whole slides and whole draws; single tiles only where no slide is known, and whoever
shows the numbers says so (``Units.statement``).

The percentile bootstrap of slides covers too little with the 30 to 50 that test sets have: accuracies near 1 are
skewed, for it is a few slides that go wrong. Here slides are resampled for Student's t itself, on the logit scale
(bootstrap-t, Efron and Tibshirani 1993, chapter 12), and ``python -m benchmarks.coverage`` measures what it is worth.

Legend: S draws of labels (seeds), N test tiles, G groups: slides, patients or single tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Interval = tuple[float, float]
_EXACT = 14
"""Most groups whose 2^G patterns of signs are all looked at."""
_BLOCK = 1000


@dataclass(frozen=True)
class Units:
    """Units that test tiles are resampled by: ``unit_N`` numbers each tile's slide or patient, 0..G-1."""

    unit_N: IntArray
    known: bool
    """They are slides or patients; otherwise every tile is a unit."""

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
        """Kind of unit, as MLflow and JSON have it."""
        return "slide or patient" if self.known else "tile"

    @property
    def statement(self) -> str:
        """Note to print beside every interval and p."""
        if self.known:
            return (
                f"95 % and p: whole slides or patients were resampled ({self.count} of them), and draws of labels "
                "where there are several"
            )
        return (
            "95 % and p: tiles were resampled; no slides known. Tiles of one slide are alike, so the intervals are too "
            "narrow unless every tile is of another slide"
        )

    @property
    def warning(self) -> str:
        """The same in one short line where it limits what may be said; empty otherwise."""
        return "" if self.known else "no slides known: tiles count as independent, so 95 % and p may be too narrow"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"unit": self.name, "units": self.count, "statement": self.statement}


@dataclass(frozen=True)
class _Mean:
    """A mean over tiles and draws, and its variance: by slides (``nan`` for a single one), and by draws of labels as
    far as these differ by more than the slides that they are scored on explain."""

    value: float
    of_slides: float
    of_draws: float
    slides_freedom: float
    draws_freedom: int

    @property
    def variance(self) -> float:
        return self.of_slides + self.of_draws

    @property
    def freedom(self) -> float:
        """Satterthwaite's."""
        parts = self.of_slides**2 / self.slides_freedom + self.of_draws**2 / max(1, self.draws_freedom)
        return self.variance**2 / parts if parts else 1.0

    @property
    def p(self) -> float:
        """Two-sided, of Student's t against 0."""
        from scipy.stats import t

        if not self.variance > 0:
            return 1.0
        return float(2 * t.sf(abs(self.value) / self.variance**0.5, self.freedom))


def _mean(values_SN: npt.NDArray[Any], units: Units) -> _Mean:
    """Slides and draws are crossed, as in Cameron, Gelbach and Miller's two-way clustering (J. Bus. Econ. Stat. 2011).

    By slides it is the jackknife's variance (CV3 of MacKinnon, Nielsen and Webb, J. Appl. Econometrics 2023), with one
    degree of freedom less than their effective number, (sum n)^2 / sum n^2 (Kish).
    """
    draws, tiles = values_SN.shape
    size_G = np.bincount(units.unit_N, minlength=units.count)
    rows = [np.bincount(units.unit_N, row, minlength=units.count) for row in values_SN.astype(np.float64)]
    sum_SG = np.stack(rows).astype(np.float64)
    value = float(values_SN.mean())
    if units.count < 2:
        return _Mean(value, float("nan"), 0.0, 1.0, 0)
    off_G = sum_SG.mean(axis=0) - value * size_G
    return _Mean(
        value=value,
        of_slides=float(_jackknife(off_G, size_G, np.ones((1, units.count)))[0]),
        of_draws=_variance_of_draws(sum_SG, size_G) if draws > 1 else 0.0,
        slides_freedom=max(1.0, tiles**2 / float(np.square(size_G).sum()) - 1),
        draws_freedom=draws - 1,
    )


def _jackknife(off_BG: Numbers, size_G: IntArray, times_BG: Numbers) -> Numbers:
    """Variance of the mean (B,), each slide being left out once, of samples that hold a slide ``times_BG`` times.

    Args:
        off_BG: a slide's sum less its tiles times the sample's mean.
    """
    slides_B, tiles_B = times_BG.sum(axis=1), times_BG @ size_G
    moved_BG = off_BG / np.maximum(tiles_B[:, None] - size_G, 1)
    return np.asarray((slides_B - 1) / slides_B * (times_BG * np.square(moved_BG)).sum(axis=1), np.float64)


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


def bootstrap_interval(
    right_SN: BoolArray, units: Units | None = None, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Interval of the accuracy, averaged over draws, for other slides and other draws of labels.

    Slides are resampled for their Student's t on the logit scale, and an end is not nearer than Student's t itself puts
    it, which few slides need. What draws of labels add is added in squares (MOVER, Zou and Donner, Stat. Med. 2008).
    Where all are right (or all wrong) nothing varies, and the open end is Clopper and Pearson's for G of G. ``nan`` for
    a single slide.

    Args:
        right_SN: whether draw s classified tile n correctly, shape (S, N).
        units: what tiles are resampled by; None takes single tiles.
    """
    from scipy.stats import t

    units = units or Units.of(None, right_SN.shape[1])
    if units.count < 2:
        return float("nan"), float("nan")
    mean, miss = _mean(right_SN, units), (1 - level) / 2
    value = mean.value
    if value in (0.0, 1.0):
        bound = miss ** (1 / units.count)
        return (bound, 1.0) if value == 1.0 else (0.0, 1 - bound)
    size_G = np.bincount(units.unit_N)
    sum_G = np.bincount(units.unit_N, right_SN.mean(axis=0)).astype(np.float64)
    t_R = _resampled_t(sum_G, size_G, right_SN.size, resamples, seed)
    slope = value * (1 - value)
    of_slides = max(mean.of_slides, slope / right_SN.size) ** 0.5 / slope
    alone = float(t.ppf(1 - miss, mean.slides_freedom))
    low, high = (max(alone, float(end)) * of_slides for end in np.quantile(t_R, [1 - miss, miss]) * (1, -1))
    draws = float(t.ppf(1 - miss, max(1, mean.draws_freedom))) * mean.of_draws**0.5 / slope
    logit = _logit(value)
    return _expit(logit - (low**2 + draws**2) ** 0.5), _expit(logit + (high**2 + draws**2) ** 0.5)


def _resampled_t(sum_G: Numbers, size_G: IntArray, predictions: int, resamples: int, seed: int) -> Numbers:
    """Student's t (R,) of slides drawn with replacement, on the logit scale and about the mean of all.

    Slides of the same size and sum are alike: it is drawn how many come of each kind, which for single tiles are few.
    """
    pairs_L2, counts_L = np.unique(np.stack([sum_G, size_G], axis=1).round(9), axis=0, return_counts=True)
    sum_L, size_L = pairs_L2.T
    slides, generator = len(sum_G), np.random.default_rng(seed)
    times_RL = generator.multinomial(slides, counts_L / slides, size=resamples).astype(np.float64)
    tiles_R = times_RL @ size_L
    nearest = 0.5 / predictions  # a sample without a wrong tile has an odds too
    mean_R = np.clip((times_RL @ sum_L) / tiles_R, nearest, 1 - nearest)
    variance_R = _jackknife(sum_L - mean_R[:, None] * size_L, size_L.astype(np.int64), times_RL)
    slope_R = mean_R * (1 - mean_R)
    error_R = np.sqrt(np.maximum(variance_R, slope_R / predictions)) / slope_R
    return np.asarray((_logit(mean_R) - _logit(sum_G.sum() / size_G.sum())) / error_R, np.float64)


@dataclass(frozen=True)
class Score:
    """A score of every draw, and how far it moves when a slide is left out."""

    value_S: Numbers
    moved_SG: Numbers
    """The score less that of all other slides."""
    weight_G: Numbers
    """Share of each slide in the score; they sum to 1."""


def ratio_score(top_SGK: Numbers, bottom_SGK: Numbers) -> Score:
    """Mean over k of sums over slides, top / bottom, as balanced accuracy, macro F1 and the Brier score are.

    A ratio whose bottom is 0 is left out of the mean, also in the samples that lack a slide.
    """
    found = [_ratios(top_GK, bottom_GK) for top_GK, bottom_GK in zip(top_SGK, bottom_SGK, strict=True)]
    left_SG = np.stack([left_G for _, left_G in found])
    value_S = np.array([value for value, _ in found])
    share_SGK = bottom_SGK / np.maximum(bottom_SGK.sum(axis=1, keepdims=True), 1e-300)
    weight_G = share_SGK.sum(axis=(0, 2))
    return Score(value_S, value_S[:, None] - left_SG, weight_G / max(weight_G.sum(), 1e-300))


def _ratios(top_GK: Numbers, bottom_GK: Numbers) -> tuple[float, Numbers]:
    """The score, and (G,) that of all slides but one."""
    top_GK, bottom_GK = (np.concatenate([0 * sums[:1], sums]) for sums in (top_GK, bottom_GK))
    rest_GK = bottom_GK.sum(axis=0) - bottom_GK
    there_GK = rest_GK > 1e-9
    ratio_GK = np.where(there_GK, top_GK.sum(axis=0) - top_GK, 0) / np.where(there_GK, rest_GK, 1)
    mean_G = ratio_GK.sum(axis=1) / np.maximum(there_GK.sum(axis=1), 1)
    return float(mean_G[0]), np.asarray(mean_G[1:], np.float64)


def score_interval(score: Score, *, level: float = 0.95, bounded: bool = True) -> Interval:
    """Interval of a score averaged over draws, for other slides and other draws of labels.

    Student's t with the jackknife's variance over slides, on the logit scale, or on that of the logarithm for a score
    without an upper bound; draws of labels add to it as in ``bootstrap_interval``. ``nan`` for a single slide.

    Args:
        score: in [0, 1], or above 0 where it is not ``bounded``.
    """
    from scipy.stats import t

    value, slides, draws = float(score.value_S.mean()), int((score.weight_G > 0).sum()), len(score.value_S)
    if slides < 2 or not np.isfinite(value):
        return float("nan"), float("nan")
    miss = (1 - level) / 2
    if value <= 0.0 or (bounded and value >= 1.0):
        bound = miss ** (1 / slides)
        return (bound, 1.0) if value > 0.0 else (0.0, 1 - bound)
    slope = value * (1 - value) if bounded else value
    alike = float(np.square(score.weight_G).sum())
    of_slides = (slides - 1) / slides * float(np.square(score.moved_SG.mean(axis=0)).sum())
    half = float(t.ppf(1 - miss, max(1.0, 1 / alike - 1))) ** 2 * of_slides
    if draws > 1:
        by_chance = np.square(score.moved_SG - score.moved_SG.mean(axis=0)).sum() / (1 - alike)
        of_draws = float(np.square(score.value_S - value).sum() - by_chance) / (draws * (draws - 1))
        half += float(t.ppf(1 - miss, draws - 1)) ** 2 * max(0.0, of_draws)
    half = half**0.5 / slope
    if not bounded:
        return value * float(np.exp(-half)), value * float(np.exp(half))
    return _expit(_logit(value) - half), _expit(_logit(value) + half)


def mean_interval(values: Sequence[Numbers], units: Units) -> Interval:
    """``score_interval`` of a mean over tiles and draws that has no upper bound.

    Args:
        values: of the tiles (N,), at least 0, for every draw.
        units: what tiles are resampled by.
    """
    sums = [np.bincount(units.unit_N, one, minlength=units.count) for one in values]
    sums_SG = np.stack(sums).astype(np.float64)
    size_G = np.bincount(units.unit_N, minlength=units.count).astype(np.float64)
    return score_interval(
        ratio_score(sums_SG[..., None], np.broadcast_to(size_G, sums_SG.shape)[..., None]), bounded=False
    )


def _logit(share: Any) -> Any:
    return np.log(share / (1 - share))


def _expit(logit: float) -> float:
    return float(1 / (1 + np.exp(-logit)))


@dataclass(frozen=True)
class Difference:
    """Difference in accuracy of A and B on the same test tiles."""

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
    from scipy.stats import t

    if a_SN.shape != b_SN.shape or a_SN.size == 0:
        raise ValueError(f"A is {a_SN.shape} and B is {b_SN.shape}: compare the same seeds on the same tiles")
    units = units or Units.of(None, a_SN.shape[1])
    gain_SN = a_SN.astype(np.int64) - b_SN
    mean = _mean(gain_SN, units)
    half = float(t.ppf(0.975, mean.freedom) * mean.variance**0.5)
    sums_G = np.bincount(units.unit_N, gain_SN.sum(axis=0), minlength=units.count).round().astype(np.int64)
    p = sign_flip_p(sums_G, flips=resamples, seed=seed)
    return Difference(
        mean=mean.value,
        interval=(max(-1.0, mean.value - half), min(1.0, mean.value + half)),
        only_a=int((gain_SN > 0).sum()),
        only_b=int((gain_SN < 0).sum()),
        p=max(p, mean.p) if mean.of_draws else p,
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
    corrected = holm_p([difference.p for difference in differences])
    return [replace(difference, p_holm=p) for difference, p in zip(differences, corrected, strict=True)]


def holm_p(p: Sequence[float]) -> list[float]:
    """The values of p in the same order after Holm's correction over all of them."""
    corrected, highest = [1.0] * len(p), 0.0
    for place, number in enumerate(np.argsort(p, kind="stable").tolist()):
        highest = max(highest, min(1.0, (len(p) - place) * p[number]))
        corrected[number] = highest
    return corrected
