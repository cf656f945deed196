"""Robustness indices of planted centres: the same tiles, half of them with shifted stains.

    python -m benchmarks.centers SHARDS --encoder runs/crc5 [--tiles 1000] [--image_size 96]

The tiles are dealt to two made-up centres, whatever their class. Those of the second are shifted at growing strength.
At strength 0 the centres differ in nothing, which is the baseline. Printed for the encoder, a random encoder of its
architecture and a colour histogram: RI, MaRI, CRoMa, and the balanced accuracy of a probe of the centre, whose chance
is .5 (slides are not known: tiles are held out). The last lines say whether each index falls from every strength to the
next.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ca2cl.common.tables import aligned
from ca2cl.data.loading.sequential import iterate_tiles
from ca2cl.data.remote.reader import ShardReader, open_index
from ca2cl.evaluation.centers.identity import center_task, scores
from ca2cl.evaluation.centers.indices import indices
from ca2cl.evaluation.centers.shifts import Shift, stain
from ca2cl.evaluation.features import Extractor, colour_histogram, frozen
from ca2cl.evaluation.probe.classifiers import logistic_regression
from ca2cl.evaluation.splits import stratified_folds, stratified_sample
from ca2cl.registry.resolve import ResolvedEncoder, resolve_encoder

STRENGTHS = (0.0, 0.05, 0.1, 0.2, 0.4)
"""Haematoxylin is multiplied by 1 + s, eosin by 1 - s."""
Array = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


class Planted(NamedTuple):
    """Classes and centres of some tiles, and their features by name at each strength."""

    labels: Integers
    centers: Integers
    features: dict[str, list[Array]]


def read(shards: str, extractors: Mapping[str, Extractor], tiles: int) -> Planted:
    """Features of the tiles, with those of centre 1 shifted."""
    index = open_index(shards)
    rows = np.flatnonzero(index.labels() >= 0)
    rows = rows[stratified_sample(index.labels()[rows], tiles, 0)]
    labels = index.labels()[rows]
    centers = stratified_folds(labels, 2, 0)
    shifts = [Shift("stain", 0, "", stain(1 + s, 1 - s)) for s in STRENGTHS]
    found: dict[str, list[list[Array]]] = {name: [[] for _ in shifts] for name in extractors}
    done = 0
    with torch.inference_mode():
        for batch, _, samples in iterate_tiles(index, ShardReader(shards, None, index=index), rows, batch_size=100):
            assert samples.tolist() == rows[done : done + len(batch)].tolist(), "a tile did not decode"
            second = torch.from_numpy(centers[done : done + len(batch)] == 1)[:, None, None, None]
            done += len(batch)
            for number, shift in enumerate(shifts):
                mixed = torch.where(second, shift.apply(batch), batch) if STRENGTHS[number] else batch
                for name, extractor in extractors.items():
                    made = extractor(mixed)
                    assert isinstance(made, torch.Tensor)
                    found[name][number].append(made.float().numpy().copy())
    return Planted(labels, centers, {n: [np.concatenate(p) for p in parts] for n, parts in found.items()})


def _extractor(found: ResolvedEncoder, size: int | None) -> Extractor:
    return frozen(found.encoder, size or found.card.input_size, found.card.mean, found.card.std)


def _predict(fit: Array, targets: Integers, held: Array) -> npt.NDArray[np.float64]:
    return logistic_regression(fit, targets, held, seed=0, strength=1.0).probabilities


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", help="labelled test shards")
    parser.add_argument("--encoder", required=True, help="as `ca2cl probe --encoder`")
    parser.add_argument("--tiles", type=int, default=1000)
    parser.add_argument("--image_size", type=int)
    options = parser.parse_args()
    own = resolve_encoder(options.encoder)
    floor = resolve_encoder("random", arch=own.card.arch, like=own.card)
    extractors = {
        "encoder": _extractor(own, options.image_size),
        "random encoder": _extractor(floor, options.image_size or own.card.input_size),
        "colour histogram": colour_histogram,
    }
    planted = read(options.shards, extractors, options.tiles)
    task = center_task(planted.centers, ["0", "1"], None)
    assert task is not None
    alone = np.arange(len(planted.labels))
    rows, falls = [], []
    for name, at_strength in planted.features.items():
        found = [indices(values, planted.labels, planted.centers, alone) for values in at_strength]
        for strength, values, one in zip(STRENGTHS, at_strength, found, strict=True):
            probe = scores(task, {name: values}, planted.labels, {"": _predict})[0]
            numbers = (one.ri, one.mari, one.croma, one.center_nearer, probe.balanced_accuracy)
            rows.append([name, f"{strength:g}", *(f"{number:.3f}" for number in numbers), f"{one.support:.2f}"])
        for index in ("ri", "mari", "croma"):
            steps = np.diff([getattr(one, index) for one in found])
            falls.append(
                f"{name}, {index}: {'falls at every step' if (steps < 0).all() else f'steps {steps.round(4)}'}"
            )
    heads = ["features", "strength", "RI", "MaRI", "CRoMa", "centre nearer", "centre probe", "support"]
    sys.stdout.write(aligned(heads, rows) + "\n".join(falls) + "\n")


if __name__ == "__main__":
    main()
