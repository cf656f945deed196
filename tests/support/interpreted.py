"""Views by Triton's interpreter beside those of the CPU: how far apart they are, as JSON on stdout. For a process of
its own, with TRITON_INTERPRET=1: that is read when kernels are defined."""

from __future__ import annotations

import json
import sys

import numpy as np
import torch

from ca2cl.config import ViewsConfig
from ca2cl.views.batch import BOTH
from ca2cl.views.build import build_views
from ca2cl.views.gpu.render import render


def differences(recipe: str, size: int, height: int, width: int, count: int) -> list[list[float]]:
    """For each view of each tile: clip, blur, the largest difference, the share of those above 1, the mean one."""
    views = build_views(ViewsConfig(recipe=recipe), size, mean=(0.5,) * 3, std=(0.2,) * 3, seed=7)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(count, 3, 9, 9, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    tiles = (smooth.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).contiguous()
    keys = torch.arange(count)
    table = views.draw(keys, 5, BOTH, (height, width))
    levels = torch.arange(256).expand(3, 256).byte()
    found = []
    made = render(tiles, table, [views.recipe.passes(view) for view in BOTH], levels, size)
    for rows, one, other in zip(table, made, views.raw(tiles, keys, 5), strict=True):
        apart = np.abs(one.numpy().astype(int) - other.numpy().astype(int))
        for row, of_row in zip(rows, apart, strict=True):
            found.append(
                [
                    float(row["clip"]),
                    float(row["blur"]),
                    int(of_row.max()),
                    float((of_row > 1).mean()),
                    float(of_row.mean()),
                ]
            )
    return found


def main() -> None:
    made = []
    for case in sys.argv[1:]:
        recipe, *sizes = case.split()
        made += differences(recipe, *map(int, sizes))
    sys.stdout.write(json.dumps(made))


if __name__ == "__main__":
    main()
