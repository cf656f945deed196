"""Render views on a CPU, tile by tile.

A tile goes through a few passes, and stays in a core's cache.

8 bits between the passes, as image augmentation has it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ca2cl.views.cpu import colour, finish, lightness, neighbours, reading
from ca2cl.views.draw.lightness import LIGHTNESS, LINEAR
from ca2cl.views.draw.table import GAUSSIAN, MEDIAN, MOTION, NO_BLUR, NOISE, Table

_BLURS = {
    GAUSSIAN: neighbours.gaussian, MOTION: neighbours.motion, MEDIAN: neighbours.median, NOISE: neighbours.noise,
}  # fmt: skip
_DENSITIES = -np.log(np.maximum(np.arange(256), 1) / 255).astype(np.float32)


def render(tiles: npt.NDArray[np.uint8], table: Table, colours: npt.NDArray[Any], out: npt.NDArray[Any]) -> None:
    """The views of a batch, by as many threads as torch takes.

    A view depends on its tile and its row of the table alone: neither the batch nor the threads change a bit.

    Args:
        tiles: (B, H, W, 3).
        table: (V, B) of ``table.ROW``.
        colours: (3, 256), what a level of a channel becomes.
        out: (V, B, S, S, 3) of the colours' type, written.
    """
    threads = min(torch.get_num_threads(), len(tiles))
    if threads <= 1:
        _render_some(tiles, table, colours, out)
        return
    with ThreadPoolExecutor(threads) as pool:
        ends = [len(tiles) * number // threads for number in range(threads + 1)]
        parts = [slice(first, last) for first, last in pairwise(ends)]
        list(pool.map(lambda part: _render_some(tiles[part], table[:, part], colours, out[:, part]), parts))


def _render_some(tiles: npt.NDArray[np.uint8], table: Table, colours: npt.NDArray[Any], out: npt.NDArray[Any]) -> None:
    _, height, width, _ = tiles.shape
    size = out.shape[2]
    planes, packed = np.empty((3, size, size), np.uint8), np.empty((height + 1, width + 1), np.uint32)
    for number, tile in enumerate(tiles):
        packed_by = 0
        for p, to in zip(table[:, number], out[:, number], strict=True):
            k = int(p["reduce"])
            if k != packed_by:
                reading.pack(tile, k, packed)
                packed_by = k
            reading.read(packed, height // k, width // k, p, planes)
            if p["stained"]:
                colour.stain(p, _DENSITIES, planes)
            if p["coloured"]:
                colour.colour(p, planes)
            if p["blur"] != NO_BLUR:
                _BLURS[int(p["blur"])](p, planes)
            if p["clip"] > 0:
                lightness.equalise(p, LINEAR, LIGHTNESS, planes)
            finish.finish(p, planes, colours, to)
