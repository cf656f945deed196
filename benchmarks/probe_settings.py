"""What the probe's fixed settings are worth, scored on held-out training tiles: no test tile is read.

    python -m benchmarks.probe_settings SHARDS --encoder runs/crc5 [--seeds 5]

A fifth of the training tiles is held out (whole slides where every tile names one). Labels are drawn from the rest at
each budget, the classifiers of the probe are fitted with each setting, and the held-out tiles are predicted. Settings
are compared on unlike features: an encoder's, a random network's and a colour histogram's. The first line of each block
is the probe's own setting, its baseline; the last column is the difference from it.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, Normalizer, StandardScaler

from ca2cl.data.remote.reader import open_index
from ca2cl.evaluation.datasets import ProbeSet, read_set, slides_of
from ca2cl.evaluation.features import colour_histogram, frozen
from ca2cl.evaluation.probe.sgd import RECIPE, sgd_classifier
from ca2cl.evaluation.protocol import HONEST
from ca2cl.evaluation.splits import labelled_subset, slide_folds, stratified_folds
from ca2cl.registry.resolve import ResolvedEncoder, resolve_encoder

BUDGETS = (0.01, 0.1, 1.0)
FOLDS = 5
Array = npt.NDArray[Any]
Predict = Callable[[Array, Array, Array, int], Array]
"""Labelled features, their labels, held-out features, seed -> predicted classes."""


class Setting(NamedTuple):
    """One way to set one classifier."""

    name: str
    predict: Predict


def _prepared(preparation: str, model: Any) -> Predict:
    steps = {
        "raw": [],
        "unit length": [Normalizer()],
        "centred, unit length": [StandardScaler(with_std=False), Normalizer()],
        "unit variance": [StandardScaler()],
    }[preparation]
    pipeline = make_pipeline(*steps, model) if steps else make_pipeline(FunctionTransformer(), model)
    return lambda fit, labels, held, seed: pipeline.fit(fit, labels).predict(held)


def logistic_settings() -> Iterator[Setting]:
    """How features are prepared, and the strength."""
    preparations = ("centred, unit length", "raw", "unit length", "unit variance")
    for preparation in preparations:
        for strength in (1.0, 0.01, 0.1, 10.0, 100.0):
            model = LogisticRegression(C=strength, max_iter=2000)
            yield Setting(f"{preparation}, C {strength:g}", _prepared(preparation, model))


def neighbour_settings() -> Iterator[Setting]:
    """How features are prepared, and how many neighbours vote."""
    for preparation in ("centred, unit length", "unit length"):
        for k in (20, 1, 5, 50):
            yield Setting(f"{preparation}, k {k}", _neighbours(preparation, k))


def _neighbours(preparation: str, k: int) -> Predict:
    def predict(fit: Array, labels: Array, held: Array, seed: int) -> Array:
        model = KNeighborsClassifier(min(k, len(fit)), weights=_similarity, metric="cosine")
        return _prepared(preparation, model)(fit, labels, held, seed)

    return predict


def _similarity(distance: Array) -> Array:
    return np.maximum(1 - distance, 1e-9)


def sgd_settings() -> Iterator[Setting]:
    """Learning rate and batch size."""
    own = (RECIPE.batch_size, RECIPE.optim.lr)
    others = [(batch, lr) for batch in (64, 256) for lr in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0) if (batch, lr) != own]
    for batch, lr in (own, *others):
        yield Setting(f"batch {batch}, lr {lr:g}", _sgd(batch, lr))


def _sgd(batch: int, lr: float) -> Predict:
    recipe = replace(RECIPE, batch_size=batch, optim=replace(RECIPE.optim, lr=lr))

    def predict(fit: Array, labels: Array, held: Array, seed: int) -> Array:
        unused = np.zeros(len(held), np.int64)
        found = sgd_classifier(fit, labels, held, unused, seed=seed, protocol=HONEST, recipe=recipe)
        return np.asarray(found.probabilities.argmax(axis=1))

    return predict


def read(shards: str, encoder: str) -> ProbeSet:
    """The training tiles with the features of the encoder, a random network and a colour histogram."""
    found = resolve_encoder(encoder)
    floor = resolve_encoder("random", arch=found.card.arch)
    return features(shards, {"encoder": found, "random": floor.beside(found)})


def features(shards: str, encoders: Mapping[str, ResolvedEncoder]) -> ProbeSet:
    """The training tiles with each encoder's features, and a colour histogram."""
    extractors = {
        name: frozen(one.encoder, one.card.input_size, one.card.mean, one.card.std) for name, one in encoders.items()
    }
    return read_set(
        shards, open_index(shards), {**extractors, "colour": colour_histogram}, torch.device("cpu"),
        cache_dir=None, batch_size=128, workers=0,
    )  # fmt: skip


def score(data: ProbeSet, setting: Setting, seeds: int) -> Array:
    """Held-out accuracy of every kind of features at every budget: (features, budgets, seeds)."""
    labels_N, slides = data.tiles.labels_N, slides_of(data.index, data.tiles.samples_N.tolist())
    accuracy = np.zeros((len(data.tiles.values), len(BUDGETS), seeds))
    for seed in range(seeds):
        folds = (
            stratified_folds(labels_N, FOLDS, seed) if slides is None else slide_folds(labels_N, slides, FOLDS, seed)
        )
        held, rest = np.flatnonzero(folds == 0), np.flatnonzero(folds != 0)
        for b, budget in enumerate(BUDGETS):
            fit = rest[labelled_subset(labels_N[rest], budget, seed)]
            for f, values_ND in enumerate(data.tiles.values.values()):
                predicted = setting.predict(values_ND[fit], labels_N[fit], values_ND[held], seed)
                accuracy[f, b, seed] = (predicted == labels_N[held]).mean()
    return accuracy


def main() -> None:
    """Print a block for each classifier."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", help="labelled training shards")
    parser.add_argument("--encoder", required=True, help="as `ca2cl probe --encoder`")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)  # of raw features with next to no penalty
    data = read(options.shards, options.encoder)
    columns = [f"{name} {budget:.0%}" for name in data.tiles.values for budget in BUDGETS]
    blocks = {"linear": logistic_settings, "linear SGD": sgd_settings, "k-NN": neighbour_settings}
    for title, settings in blocks.items():
        print(
            f"\n{title}: held-out accuracy over {options.seeds} seeds\n{'':32}" + "".join(f"{c:>14}" for c in columns)
        )
        baseline = None
        for setting in settings():
            found = score(data, setting, options.seeds).mean(axis=2)
            baseline = found if baseline is None else baseline
            cells = "".join(f"{value:14.3f}" for value in found.flatten())
            print(f"{setting.name:32}{cells}   mean {found.mean():.3f} ({(found - baseline).mean():+.3f})", flush=True)


if __name__ == "__main__":
    main()
