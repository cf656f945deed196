"""Which of some encoders is best, scored on held-out training tiles: no test tile is read.

    python -m benchmarks.recipe_choice SHARDS --encoder runs/a runs/b [--seeds 5]

Tiles are held out, labels drawn and features classified as by ``benchmarks.probe_settings``, with the probe's own
settings. The lines after the encoders' are their differences from the first one, seed by seed.
"""

from __future__ import annotations

import argparse

import numpy as np

from benchmarks.probe_settings import BUDGETS, Array, features, logistic_settings, neighbour_settings, score
from ca2cl.registry.resolve import resolve_encoder


def main() -> None:
    """Print one line for each encoder, the colour histogram, and each difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", help="labelled training shards")
    parser.add_argument("--encoder", required=True, nargs="+", help="each as `ca2cl probe --encoder`")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    data = features(options.shards, {name: resolve_encoder(name) for name in options.encoder})
    classifiers = {"linear": next(logistic_settings()), "k-NN": next(neighbour_settings())}
    found = np.concatenate([score(data, setting, options.seeds) for setting in classifiers.values()], axis=1)
    columns = [f"{title} {budget:.0%}" for title in classifiers for budget in BUDGETS]
    print(f"held-out accuracy over {options.seeds} seeds, mean ± sd\n{'':40}" + "".join(f"{c:>15}" for c in columns))
    scores = dict(zip(data.tiles.values, found, strict=True))
    for name, accuracy in scores.items():
        print(_line(name, accuracy))
    for name in options.encoder[1:]:
        print(_line(f"{name} less the first", scores[name] - scores[options.encoder[0]]))


def _line(name: str, accuracy: Array) -> str:
    """Accuracies of (classifiers and budgets, seeds)."""
    return f"{name[-40:]:40}" + "".join(f"{row.mean():8.3f} ± {row.std(ddof=1):.3f}" for row in accuracy)


if __name__ == "__main__":
    main()
