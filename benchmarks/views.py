"""The paper's two views, in batches, against torchvision's v2 transforms for the same recipe, tile by tile.

    python -m benchmarks.views [--tiles 64] [--repeats 5]

Both run on one thread, from decoded 224 px uint8 tiles to normalised float32 views (and ours to bfloat16, too), so a
number is pairs of views a second and core. Repeats are interleaved; the ratio is the median of the rounds' ratios of
CPU time, in brackets their range.

The baseline has the recipe's operations and probabilities with what v2 offers. Where v2 has no such operation it gets
one that is cheaper or as dear: a plain histogram equalisation for CLAHE, Gaussian blurs for the motion and median blur,
a perspective warp for the optical and the grid distortion.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from benchmarks.loader import SIDE, tissue
from ca2cl.config import IMAGENET_MEAN, IMAGENET_STD, ViewsConfig
from ca2cl.views.build import build_views

FLOOR = 5.0


def _both() -> list[v2.Transform]:
    return [
        v2.RandomApply([v2.Lambda(lambda image: image.transpose(-1, -2))], p=0.5),
        v2.RandomVerticalFlip(0.5),
        v2.RandomHorizontalFlip(0.5),
        v2.RandomApply([v2.ColorJitter(brightness=0.2)], p=0.75),
        v2.RandomApply([v2.ColorJitter(contrast=0.2)], p=0.75),
        v2.RandomApply([v2.ColorJitter(hue=10 / 180, saturation=20 / 255, brightness=10 / 255)], p=0.5),
    ]


def _affine(p: float) -> v2.Transform:
    warp = v2.RandomAffine(15, translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR)
    return v2.RandomApply([warp], p=p)


def baseline(tiles: Tensor) -> Callable[[], object]:
    """The two views of every tile by v2 transforms, one tile after another."""
    finish = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    noise = v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.GaussianNoise(sigma=4 / 255), v2.ToDtype(torch.uint8, scale=True)]
    )
    blurs = [v2.GaussianBlur(size, sigma=(0.5, 1.5)) for size in (3, 5, 5)]
    warps = [v2.RandomPerspective(0.2, p=1.0), v2.RandomPerspective(0.2, p=1.0), v2.ElasticTransform(3.0)]
    share = 0.375**2
    strong = v2.Compose([
        *_both(),
        v2.RandomApply([v2.RandomChoice([*blurs, noise])], p=0.7),
        v2.RandomApply([v2.RandomChoice(warps)], p=0.4),
        v2.RandomEqualize(0.7),
        _affine(0.85),
        v2.RandomErasing(0.7, scale=(share, share), ratio=(1.0, 1.0)),
        *finish,
    ])  # fmt: skip
    weak = v2.Compose([*_both(), _affine(0.5), *finish])
    planes = tiles.permute(0, 3, 1, 2).contiguous()
    return lambda: [torch.stack([view(tile) for tile in planes]) for view in (strong, weak)]


def ours(tiles: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    """The same views as training makes them."""
    views = build_views(ViewsConfig(recipe="ca2cl"), SIDE, mean=IMAGENET_MEAN, std=IMAGENET_STD, seed=0, dtype=dtype)
    keys = torch.randint(0, 2**62, (len(tiles),), generator=torch.Generator().manual_seed(0))
    epochs = iter(range(10**6))
    return lambda: views(tiles, keys, next(epochs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=64, help="tiles in a batch")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes, after one that warms up")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tiles = torch.from_numpy(np.stack([np.asarray(tissue(seed)) for seed in range(arguments.tiles)]))
    passes = {
        "float32": ours(tiles, torch.float32), "bfloat16": ours(tiles, torch.bfloat16),
        "torchvision v2": baseline(tiles),
    }  # fmt: skip
    taken: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(arguments.repeats + 1):
        for name, one_pass in passes.items():
            began = time.process_time()
            one_pass()
            taken[name].append(time.process_time() - began)
    rate = {name: len(tiles) / statistics.median(seconds[1:]) for name, seconds in taken.items()}
    theirs = taken["torchvision v2"][1:]
    for name in ("float32", "bfloat16"):
        ratios = sorted(there / here for here, there in zip(taken[name][1:], theirs, strict=True))
        print(
            f"views, {name}: {rate[name]:,.0f} pairs/s a core; torchvision v2, tile by tile "
            f"{rate['torchvision v2']:,.0f}; ratio {statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}] "
            f"(wanted {FLOOR:g}; {SIDE} px, {len(tiles)} tiles)"
        )


if __name__ == "__main__":
    main()
