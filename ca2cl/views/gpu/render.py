"""Render views on a GPU, the whole batch at once.

It takes 1 to 5 launches a view, and one copy of the table.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ca2cl.runtime.device import to_device
from ca2cl.views.draw.lightness import LIGHTNESS, LINEAR
from ca2cl.views.draw.table import Passes, Table
from ca2cl.views.gpu import ops


def render(tiles: Tensor, table: Table, passes: Sequence[Passes], colours: Tensor, size: int) -> list[Tensor]:
    """The views of a batch.

    Args:
        tiles: uint8 (B, H, W, 3), on the GPU.
        table: (V, B) of ``table.ROW``, on the host.
        passes: what the rows of each view may ask for.
        colours: (3, 256) of the result's type, on the host: what a level of a channel becomes.
        size: side S of the views.

    Returns:
        V tensors (B, S, S, 3) on the GPU.
    """
    parts = (table.view("<f4").ravel(), colours.float().numpy().ravel(), LINEAR, LIGHTNESS)
    there = to_device(torch.from_numpy(np.concatenate(parts, dtype=np.float32)), tiles.device)
    rows, constants = there[: parts[0].size], there[parts[0].size :]
    rows, tiles = rows.view(*table.shape, -1), tiles.contiguous()
    return [_render_view(tiles, rows[v], constants, size, colours.dtype, needs) for v, needs in enumerate(passes)]


def _render_view(
    tiles: Tensor, rows: Tensor, constants: Tensor, size: int, dtype: torch.dtype, needs: Passes
) -> Tensor:
    view: Tensor
    if needs.stain or needs.blur or needs.clahe:
        images, sums = ops.read(tiles, rows, size, needs.stain)
        if needs.blur:
            images = ops.across(images, rows, sums, needs.stain)
        if needs.stain:
            view = ops.down(images, rows, constants, dtype)
        else:
            images = ops.near(images, rows) if needs.blur else images
            view = ops.finish(images, rows, ops.tables(images, rows, constants), constants, dtype)
    else:
        view = ops.weak(tiles, rows, constants, size, dtype)
    return view
