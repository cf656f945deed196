"""A recipe's two views, in batches, against torchvision's v2 transforms tile by tile, and against an older version.

    python -m benchmarks.views [--recipe ca2cl] [--tiles 64] [--repeats 5] [--against ../ca2cl-f1aef52]

All run on one thread, from decoded 224 px uint8 tiles to normalised float32 views (and ours to bfloat16, too), so a
number is pairs of views a second and core. Repeats are interleaved; a ratio is the median of the rounds' ratios of CPU
time, in brackets their range.

``--against`` is a checkout of an older commit (``git worktree add ../ca2cl-f1aef52 f1aef52``), whose own float32 views
are made in a process of its own.

torchvision's has the recipe's operations and probabilities with what v2 offers. Where v2 has no such operation it gets
one that is cheaper or as dear: a plain histogram equalisation for CLAHE, Gaussian blurs for the motion and median blur,
a perspective warp for the optical and the grid distortion, and for ``crop``'s jitter of stains nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from benchmarks.loader import SIDE, tissue
from ca2cl.config import IMAGENET_MEAN, IMAGENET_STD, ViewsConfig
from ca2cl.views.build import build_views

FLOORS = {"torchvision": 5.0, "older": 4.0}
_OLDER = """
import sys, time
import numpy as np, torch
from ca2cl.config import IMAGENET_MEAN, IMAGENET_STD, ViewsConfig
from ca2cl.views import build_views
torch.set_num_threads(1)
tiles = torch.from_numpy(np.load(sys.argv[1]))
views = build_views(ViewsConfig(recipe=sys.argv[2]), tiles.shape[1], mean=IMAGENET_MEAN, std=IMAGENET_STD, seed=0)
keys = torch.randint(0, 2**62, (len(tiles),), generator=torch.Generator().manual_seed(0))
for epoch, _ in enumerate(sys.stdin):
    began = time.process_time()
    views(tiles, keys, epoch)
    sys.stdout.write(f"{time.process_time() - began}\\n")
    sys.stdout.flush()
"""
"""A pass for each line that comes; answers with its CPU seconds."""


def _flips() -> list[v2.Transform]:
    transpose = v2.RandomApply([v2.Lambda(lambda image: image.transpose(-1, -2))], p=0.5)
    return [transpose, v2.RandomVerticalFlip(0.5), v2.RandomHorizontalFlip(0.5)]


def _both() -> list[v2.Transform]:
    return [
        *_flips(),
        v2.RandomApply([v2.ColorJitter(brightness=0.2)], p=0.75),
        v2.RandomApply([v2.ColorJitter(contrast=0.2)], p=0.75),
        v2.RandomApply([v2.ColorJitter(hue=10 / 180, saturation=20 / 255, brightness=10 / 255)], p=0.5),
    ]


def _affine(p: float) -> v2.Transform:
    warp = v2.RandomAffine(15, translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR)
    return v2.RandomApply([warp], p=p)


def _paper(finish: list[v2.Transform]) -> list[v2.Transform]:
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
    return [strong, v2.Compose([*_both(), _affine(0.5), *finish])]


def _crop(finish: list[v2.Transform]) -> list[v2.Transform]:
    taps = 2 * 6 + 1  # as ours: three deviations
    view = v2.Compose([
        v2.RandomResizedCrop(SIDE, (0.2, 1.0), antialias=False),
        *_flips(),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.05)], p=0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(taps, sigma=(0.1, 2.0))], p=0.5),
        *finish,
    ])  # fmt: skip
    return [view, view]


def baseline(tiles: Tensor, recipe: str = "ca2cl") -> Callable[[], object]:
    """The two views of every tile by v2 transforms, one tile after another."""
    finish = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    both = _paper(finish) if recipe == "ca2cl" else _crop(finish)
    planes = tiles.permute(0, 3, 1, 2).contiguous()
    return lambda: [torch.stack([view(tile) for tile in planes]) for view in both]


def ours(tiles: Tensor, dtype: torch.dtype, recipe: str) -> Callable[[], object]:
    """The same views as training makes them."""
    config = ViewsConfig(recipe=recipe)  # type: ignore[arg-type]
    views = build_views(config, SIDE, mean=IMAGENET_MEAN, std=IMAGENET_STD, seed=0, dtype=dtype)
    keys = torch.randint(0, 2**62, (len(tiles),), generator=torch.Generator().manual_seed(0))
    epochs = iter(range(10**6))
    return lambda: views(tiles, keys, next(epochs))


def timed(one_pass: Callable[[], object]) -> Callable[[], float]:
    """CPU seconds of a pass."""

    def seconds() -> float:
        began = time.process_time()
        one_pass()
        return time.process_time() - began

    return seconds


@contextmanager
def older(checkout: Path, tiles: Tensor, recipe: str) -> Iterator[Callable[[], float]]:
    """CPU seconds of a pass of an older version, in a process that lives as long as the block."""
    file = Path(os.environ.get("TMPDIR", "/tmp")) / f"views-{os.getpid()}.npy"  # noqa: S108 - its own, and removed
    np.save(file, tiles.numpy())
    command = [sys.executable, "-c", _OLDER, str(file), recipe]
    env = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    child = subprocess.Popen(
        command, cwd=checkout, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )

    def seconds() -> float:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write("\n")
        child.stdin.flush()
        return float(child.stdout.readline())

    try:
        yield seconds
    finally:
        child.kill()
        child.wait()
        file.unlink()


def compare(passes: dict[str, Callable[[], float]], repeats: int, tiles: int, recipe: str) -> None:
    """Time the passes in turns, the first round for warming up, and print a line for each of ours and baseline."""
    taken: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(repeats + 1):
        for name, seconds in passes.items():
            taken[name].append(seconds())
    rate = {name: tiles / statistics.median(found[1:]) for name, found in taken.items()}
    for name in ("float32", "bfloat16"):
        for other in [one for one in passes if one not in ("float32", "bfloat16")]:
            ratios = sorted(there / here for here, there in zip(taken[name][1:], taken[other][1:], strict=True))
            floor = FLOORS["torchvision" if "torchvision" in other else "older"]
            print(
                f"views, {recipe}, {name}: {rate[name]:,.0f} pairs/s a core; {other} {rate[other]:,.0f}; ratio "
                f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}] (wanted {floor:g}; {SIDE} px, "
                f"{tiles} tiles)"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=("ca2cl", "crop"), default="ca2cl")
    parser.add_argument("--tiles", type=int, default=64, help="tiles in a batch")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes, after one that warms up")
    parser.add_argument("--against", type=Path, help="checkout of an older version")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tiles = torch.from_numpy(np.stack([np.asarray(tissue(seed)) for seed in range(arguments.tiles)]))
    recipe = arguments.recipe
    passes = {
        "float32": timed(ours(tiles, torch.float32, recipe)), "bfloat16": timed(ours(tiles, torch.bfloat16, recipe)),
        "torchvision v2, tile by tile": timed(baseline(tiles, recipe)),
    }  # fmt: skip
    if arguments.against is None:
        compare(passes, arguments.repeats, len(tiles), recipe)
        return
    with older(arguments.against, tiles, recipe) as seconds:
        passes[arguments.against.name] = seconds
        compare(passes, arguments.repeats, len(tiles), recipe)


if __name__ == "__main__":
    main()
