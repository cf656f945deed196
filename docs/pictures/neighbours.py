"""Draw the README's picture: test tiles, and the most alike on other slides.

    python docs/pictures/neighbours.py ca2cl-quickstart/run ca2cl-quickstart/shards/test docs/pictures/neighbours.png

One query of every class, drawn by seed, with its nearest tiles of other slides: by the encoder, and by colour alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont

import ca2cl
from ca2cl.evaluation.features import colour_histogram

NEAREST, COLOURS = 4, 96
TILE, FRAME, GAP, SIDE, HEAD = 64, 3, 10, 46, 20
RIGHT, WRONG, QUERY = "#009e73", "#d55e00", "#404040"
CELL = TILE + 2 * FRAME + 2


def nearest(vectors: npt.NDArray[np.float32], groups: npt.NDArray[np.str_], query: int) -> list[int]:
    """Rows of other slides than the query's with the highest cosine of centred vectors."""
    centred = vectors - vectors.mean(0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    likeness = np.where(groups == groups[query], -np.inf, centred @ centred[query])
    return [int(row) for row in np.argsort(-likeness)[:NEAREST]]


def draw(encoder: str, shards: str, out: str, seed: int = 0) -> None:
    """Write the picture."""
    dataset = ca2cl.ShardDataset(shards)
    tiles = torch.stack([dataset[row][0] for row in range(len(dataset))])
    ways = {
        "the encoder": ca2cl.embed(dataset, encoder),
        "colour alone": colour_histogram(tiles.permute(0, 2, 3, 1)).numpy(),
    }
    labels, groups, rng = np.asarray(dataset.targets), np.asarray(dataset.groups()), np.random.default_rng(seed)
    rows = []
    for label, name in enumerate(dataset.classes):
        query = int(rng.choice(np.flatnonzero(labels == label)))
        rows.append((name, query, [nearest(vectors, groups, query) for vectors in ways.values()]))
    heads = []
    for way, vectors in ways.items():
        found = [labels[nearest(vectors, groups, row)] == labels[row] for row in range(len(labels))]
        heads.append(f"nearest by {way} ({np.mean(found):.0%} of all right)")
    sheet = paint(rows, tiles.permute(0, 2, 3, 1).numpy(), labels, heads)
    sheet.quantize(COLOURS, dither=Image.Dither.NONE).save(out, optimize=True)


def paint(
    rows: Sequence[tuple[str, int, list[list[int]]]], tiles: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64],
    heads: Sequence[str],
) -> Image.Image:  # fmt: skip
    """The sheet: a row for each query, a green frame around tiles of its class and an orange one around others."""
    places = [SIDE, *(SIDE + CELL + GAP + way * (NEAREST * CELL + GAP) for way in range(len(heads)))]
    width, height = places[-1] + NEAREST * CELL, HEAD + len(rows) * CELL
    sheet = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for left, head in zip(places, ["query", *heads], strict=True):
        pen.text((left, 2), head, "black", font)
    for number, (name, query, found) in enumerate(rows):
        top = HEAD + number * CELL
        pen.text((2, top + CELL // 2 - 8), name, "black", font)
        for left, row in zip(places, [[query], *found], strict=True):
            for place, tile in enumerate(row):
                colour = QUERY if tile == query else RIGHT if labels[tile] == labels[query] else WRONG
                corner = (left + place * CELL, top)
                pen.rectangle((*corner, corner[0] + TILE + 2 * FRAME - 1, top + TILE + 2 * FRAME - 1), colour)
                picture = Image.fromarray(tiles[tile]).resize((TILE, TILE))
                sheet.paste(picture, (corner[0] + FRAME, top + FRAME))
    return sheet


if __name__ == "__main__":
    draw(*sys.argv[1:4])
