"""Draw the README's picture: tiles, and the test tiles that an encoder finds most alike.

python docs/pictures/neighbours.py ca2cl-quickstart/run ca2cl-quickstart/shards/test docs/pictures/neighbours.png
"""

from __future__ import annotations

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import ca2cl

NEAREST = 7


def draw(encoder: str, shards: str, out: str, seed: int = 0) -> None:
    """One query of every class with its nearest other tiles by cosine of centred features, drawn at random."""
    dataset = ca2cl.ShardDataset(shards)
    vectors = ca2cl.embed(dataset, encoder)
    vectors -= vectors.mean(0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rng, classes = np.random.default_rng(seed), dataset.classes
    queries = [int(rng.choice(np.flatnonzero(dataset.targets == label))) for label in range(len(classes))]
    figure, axes = plt.subplots(len(queries), NEAREST + 1, figsize=(NEAREST + 2.0, len(queries)))
    for row, query in zip(axes, queries, strict=True):
        order = np.argsort(-vectors @ vectors[query])
        for axis, number in zip(row, [query, *order[order != query][:NEAREST]], strict=True):
            tile, label = dataset[int(number)]
            axis.imshow(tile.permute(1, 2, 0).numpy())
            axis.set(xticks=[], yticks=[])
            same = label == dataset.targets[query]
            for side in axis.spines.values():
                side.set(color="black" if number == query else "tab:green" if same else "tab:red", linewidth=2.5)
        row[0].set_ylabel(classes[dataset.targets[query]], rotation=0, ha="right", va="center")
    axes[0][0].set_title("query", fontsize=9)
    axes[0][1].set_title("nearest", fontsize=9)
    figure.tight_layout(pad=0.3)
    figure.savefig(out, dpi=80)


if __name__ == "__main__":
    draw(*sys.argv[1:4])
