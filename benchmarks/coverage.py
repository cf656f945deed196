"""Do the intervals and the test of ``evaluation.statistics`` hold what they promise? Simulated test sets, known truths.

    python -m benchmarks.coverage [--repeats 1000] [--slides 30 50 100] [--seed 0]

A slide's accuracy is logit-normal, slides are of unequal sizes (Dirichlet, 2), and tiles of a slide are right or wrong
on their own given that accuracy. The truth is the mean over all slides that there could be. Wanted: an interval of 95 %
covers it in 90 % or more of the test sets, and of two encoders that are equally good a difference is called real at
p < .05 in 3 to 7 %. Beside them stands what taking tiles for independent gives, and the percentile bootstrap of slides.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ca2cl.evaluation.calibration.probability_errors import brier_scores
from ca2cl.evaluation.metrics import class_recalls, classification_metrics, score_intervals
from ca2cl.evaluation.statistics import Units, bootstrap_interval, mean_interval, paired_difference

Numbers = npt.NDArray[np.float64]
SPREADS = (0.0, 0.5, 1.0, 1.5)
"""Standard deviations of a slide's logit."""
DRAWS, TILES, BASE = 5, 1000, 0.6
RESAMPLES = 1000
CLASSES = 4


class World(NamedTuple):
    """What test sets are drawn from."""

    slides: int
    spread: float
    logit: float = 3.0
    """Median slide's logit: 3 is an accuracy of .95."""
    tiles: int = 100
    """A slide, on average."""

    def truth(self) -> float:
        """Mean accuracy over slides."""
        points, weights = np.polynomial.hermite_e.hermegauss(80)
        return float((weights * _expit(self.logit + self.spread * points)).sum() / weights.sum())

    def units(self, generator: np.random.Generator) -> Units:
        """The slides of a test set."""
        shares = generator.dirichlet(np.full(self.slides, 2.0))
        sizes = 1 + generator.multinomial(self.slides * self.tiles - self.slides, shares)
        return Units(np.repeat(np.arange(self.slides), sizes), known=True)


def one_classifier(world: World, generator: np.random.Generator) -> tuple[npt.NDArray[np.bool_], Units, float]:
    """Right or wrong (1, N), the slides, and the intra-class correlation of this test set."""
    units = world.units(generator)
    accuracy_G = _expit(world.logit + world.spread * generator.standard_normal(world.slides))
    right_N = generator.random(len(units.unit_N)) < accuracy_G[units.unit_N]
    mean = accuracy_G.mean()
    return right_N[None], units, float(accuracy_G.var() / (mean * (1 - mean)))


def two_equals(world: World, generator: np.random.Generator) -> tuple[Any, Any, Units]:
    """Two classifiers that are equally good over all slides: a slide's logits correlate .8, its tiles' luck .7."""
    units = world.units(generator)
    z = generator.standard_normal((2, world.slides))
    logits = (z[0], 0.8 * z[0] + 0.6 * z[1])
    tiles = len(units.unit_N)
    luck = generator.random(tiles)
    other = np.where(generator.random(tiles) < 0.7, luck, generator.random(tiles))
    a, b = (
        u < _expit(world.logit + world.spread * logit_G)[units.unit_N]
        for u, logit_G in zip((luck, other), logits, strict=True)
    )
    return a[None], b[None], units


def two_equals_over_draws(spread: float, slides: int, generator: np.random.Generator) -> tuple[Any, Any, Units]:
    """Two classifiers that are equally good over all draws of labels: five draws, whose accuracies have this sd."""
    from scipy.stats import norm

    z = generator.standard_normal((2, DRAWS))
    accuracies = [np.clip(BASE + spread * of, 0.05, 0.95) for of in (z[0], 0.5 * z[0] + 0.75**0.5 * z[1])]
    unit_N = np.repeat(np.arange(slides), TILES // slides)
    shared = 0.7 * generator.standard_normal(TILES)
    found = []
    for accuracy_S in accuracies:
        own = 0.5 * generator.standard_normal(TILES) + 0.5 * generator.standard_normal(slides)[unit_N]
        noise_SN = shared + own + 0.5 * generator.standard_normal((DRAWS, TILES))
        sd = (0.49 + 0.25 + 0.25 + 0.25) ** 0.5
        found.append(noise_SN < norm.ppf(accuracy_S)[:, None] * sd)
    return found[0], found[1], Units(unit_N, known=True)


def percentile_bootstrap(right_N: Numbers, units: Units, generator: np.random.Generator) -> tuple[float, float]:
    """The interval that is not used: slides drawn with replacement, quantiles of the accuracies."""
    size_G, sum_G = np.bincount(units.unit_N), np.bincount(units.unit_N, right_N)
    times_RG = generator.multinomial(units.count, np.full(units.count, 1 / units.count), RESAMPLES)
    low, high = np.quantile((times_RG @ sum_G) / (times_RG @ size_G), [0.025, 0.975])
    return float(low), float(high)


def coverage(world: World, repeats: int, generator: np.random.Generator) -> tuple[float, float, float, float]:
    """Mean intra-class correlation; shares of test sets whose interval holds the truth: over single tiles, by the
    percentile bootstrap of slides, and ours."""
    truth, held, correlation = world.truth(), np.zeros(3), 0.0
    for _ in range(repeats):
        right_SN, units, found = one_classifier(world, generator)
        correlation += found
        intervals = (
            bootstrap_interval(right_SN, resamples=RESAMPLES),
            percentile_bootstrap(right_SN[0].astype(float), units, generator),
            bootstrap_interval(right_SN, units, resamples=RESAMPLES),
        )
        held += [low <= truth <= high for low, high in intervals]
    return (correlation / repeats, *(held / repeats).tolist())


def false_positives(world: World, repeats: int, generator: np.random.Generator) -> tuple[float, float, float]:
    """Shares of pairs of equals that are called different: p < .05 over single tiles (McNemar), p < .05 and an
    interval without 0 over slides."""
    called = np.zeros(3)
    for seed in range(repeats):
        a, b, units = two_equals(world, generator)
        alone = paired_difference(a, b, resamples=RESAMPLES, seed=seed)
        found = paired_difference(a, b, units, resamples=RESAMPLES, seed=seed)
        called += [alone.p < 0.05, found.p < 0.05, not found.interval[0] <= 0 <= found.interval[1]]
    alone_p, p, interval = (called / repeats).tolist()
    return alone_p, p, interval


def over_draws(spread: float, slides: int, repeats: int, generator: np.random.Generator) -> tuple[float, float, float]:
    """Shares of pairs of equals with p < .05 and with an interval without 0; of intervals that hold the accuracy."""
    called = np.zeros(3)
    for seed in range(repeats):
        a, b, units = two_equals_over_draws(spread, slides, generator)
        found = paired_difference(a, b, units, resamples=RESAMPLES, seed=seed)
        low, high = bootstrap_interval(a, units, resamples=RESAMPLES)
        called += [found.p < 0.05, not found.interval[0] <= 0 <= found.interval[1], low <= BASE <= high]
    p, interval, held = (called / repeats).tolist()
    return p, interval, held


def four_classes(world: World, generator: np.random.Generator) -> tuple[Any, Any, Units]:
    """Labels and probabilities: slides hold classes in unlike shares, and shift the logit of the true class, all of
    them together and each class on its own."""
    units = world.units(generator)
    unit_N = units.unit_N
    share_GK = generator.dirichlet(np.full(CLASSES, 0.5), world.slides)
    labels_N = (generator.random(len(unit_N))[:, None] > share_GK.cumsum(axis=1)[unit_N, :-1]).sum(axis=1)
    shift_GK = generator.standard_normal((world.slides, 1)) + 0.5 * generator.standard_normal((world.slides, CLASSES))
    logits_NK = 1.5 * generator.standard_normal((len(unit_N), CLASSES))
    logits_NK[np.arange(len(unit_N)), labels_N] += world.logit + world.spread * shift_GK[unit_N, labels_N]
    odds_NK = np.exp(logits_NK)
    return labels_N, odds_NK / odds_NK.sum(axis=1, keepdims=True), units


def coverage_of_scores(world: World, repeats: int, generator: np.random.Generator) -> dict[str, float]:
    """Shares of test sets whose interval holds the truth, by score; the truth is that of 2,000 slides."""
    labels_N, p_NK, units = four_classes(world._replace(slides=2000), generator)
    found = classification_metrics(labels_N, p_NK).scores()
    recall = float((p_NK.argmax(axis=1) == labels_N)[labels_N == 0].mean())
    truth = {name: found[name] for name in ("balanced_accuracy", "macro_f1", "macro_auroc")}
    truth |= {"recall": recall, "brier": float(brier_scores(labels_N, p_NK).mean())}
    held = dict.fromkeys(truth, 0.0)
    for _ in range(repeats):
        labels_N, p_NK, units = four_classes(world, generator)
        intervals = score_intervals(labels_N, [p_NK], units)
        intervals["recall"] = class_recalls(labels_N, [p_NK], units)[0].interval
        intervals["brier"] = mean_interval([brier_scores(labels_N, p_NK)], units)
        for name, (low, high) in intervals.items():
            held[name] += low <= truth[name] <= high
    return {name: count / repeats for name, count in held.items()}


def _expit(logits: Numbers) -> Numbers:
    return np.asarray(1 / (1 + np.exp(-logits)), np.float64)


def main() -> None:
    """Print four tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--slides", type=int, nargs="+", default=[30, 50, 100])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = np.random.default_rng(options.seed)
    print("| slides | sd of a slide's logit | accuracy | ICC | 95 % over tiles | percentile, slides | ours |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    worlds = [World(slides, spread, logit) for slides in options.slides for logit in (1.0, 3.0) for spread in SPREADS]
    for world in worlds:
        correlation, *held = coverage(world, options.repeats, generator)
        shown = " | ".join(f"{share:.3f}" for share in held)
        print(f"| {world.slides} | {world.spread} | {world.truth():.3f} | {correlation:.3f} | {shown} |", flush=True)
    print("\n| slides | sd | p < .05 over tiles (McNemar) | p < .05, ours | interval without 0, ours |")
    print("| --- | --- | --- | --- | --- |")
    for world in (World(slides, spread) for slides in options.slides for spread in SPREADS):
        shown = " | ".join(f"{share:.3f}" for share in false_positives(world, options.repeats, generator))
        print(f"| {world.slides} | {world.spread} | {shown} |", flush=True)
    print("\n| slides | sd over five draws of labels | p < .05 | interval without 0 | accuracy's interval holds it |")
    print("| --- | --- | --- | --- | --- |")
    for slides in (50, TILES):
        for spread in (0.0, 0.01, 0.03, 0.07):
            shown = " | ".join(f"{share:.3f}" for share in over_draws(spread, slides, options.repeats, generator))
            print(f"| {slides if slides < TILES else 'single tiles'} | {spread} | {shown} |", flush=True)
    print("\n| slides | sd | balanced accuracy | macro F1 | macro AUROC | a class's recall | Brier score |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for world in (World(slides, spread) for slides in options.slides for spread in SPREADS):
        of_score = coverage_of_scores(world, options.repeats, generator)
        shown = " | ".join(f"{share:.3f}" for share in of_score.values())
        print(f"| {world.slides} | {world.spread} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
