"""A million different tiles of real tissue, with planted copies.

    CUTS=benchmarks.leak_cuts:Cuts
    ca2cl shard $CUTS:a,950000,IMAGES+IMAGES shards/a --encode jpeg
    ca2cl shard $CUTS:b,50000,IMAGES+IMAGES shards/b --encode jpeg
    ca2cl doctor --leaks shards/a shards/b --leaks_output leaks
    python -m benchmarks.leak_cuts leaks/pairs.csv

The tiles have 64 pixels. They are cut from images at two scales and six angles, a third of their side apart, which is
further than copies may be shifted. Set a has every second image. Set b has the others, and 200 copies of tiles of a for
each change.
"""

from __future__ import annotations

import csv
import hashlib
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.leak_alarms import copied, image_paths
from benchmarks.leaks import CHANGES, Change, after, encoded, macenko, reinhard
from ca2cl.data.sources.base import SourceOptions, Tile

SIDE = 64
_COPIES = 200
_APART = 0.34
_MARGIN = 3
_ANGLES, _WINDOWS = (0, 15, 30, 45, 60, 75), (64, 96)
_TURNED_60 = after(CHANGES["turned by 90°"], encoded("JPEG", 60))
KINDS: dict[str, tuple[Change, tuple[int, int]]] = {
    **{name: (change, (0, 0)) for name, change in CHANGES.items()},
    "shifted by (2, 0)": (after(), (2, 0)), "shifted by (0, 2)": (after(), (0, 2)),
    "shifted by (2, 2)": (after(), (2, 2)), "shifted by (1, 1)": (after(), (1, 1)),
    "Reinhard, shifted by (2, 2), turned, JPEG 60": (after(reinhard, _TURNED_60), (2, 2)),
    "Macenko, shifted by (2, 2), turned, JPEG 60": (after(macenko, _TURNED_60), (2, 2)),
}  # fmt: skip
"""Change, and rows and columns that the window is shifted by."""


@dataclass(frozen=True)
class Place:
    """A window of an image: its centre, its side in pixels of the image, its angle in degrees."""

    path: str
    x: float
    y: float
    window: int
    angle: int

    @property
    def key(self) -> str:
        """Its name in a shard."""
        return f"{Path(self.path).stem}_{self.window}_{self.angle}_{self.x:.0f}_{self.y:.0f}"


class Cuts:
    """The source ``SET,TILES,IMAGES+IMAGES``: different cuts of real images, and in set b copies of those of set a."""

    def __init__(self, source: str, options: SourceOptions, *, mixed: bool = False) -> None:
        which, count, folders = source.split(",")
        tiles, copies = int(count), _COPIES * len(KINDS) if which == "b" else 0
        paths = different_images(folders.split("+"))
        own, others = paths["ab".index(which) :: 2], paths["ba".index(which) :: 2]
        places = chosen(own, tiles - copies)
        self.name, self.classes, self.ungrouped = f"cuts-{which}", list[str](), list[int]()
        self.labels = np.full(tiles, -1, np.int32)
        self.digest = hashlib.sha256(f"{source} {SIDE} {_APART}".encode()).hexdigest()
        self._places = [*places, *(chosen(others, tiles)[:copies] if copies else [])]
        self._first_copy = len(places)
        self.reader = CutReader(len(places), self._places[len(places) :])

    def __len__(self) -> int:
        return len(self._places)

    def tiles(self, rows: Iterable[int]) -> list[Tile]:
        """The tiles with these numbers."""
        return [self._tile(int(row)) for row in rows]

    def _tile(self, row: int) -> Tile:
        place, copy = self._places[row], row - self._first_copy
        key = place.key if copy < 0 else f"copy-{copy % len(KINDS)}-of-{place.key}"
        meta = {"path": place.path, "cx": place.x, "cy": place.y, "window": place.window, "angle": place.angle}
        return Tile(key, key, row, -1, None, None, meta)


@dataclass(frozen=True)
class CutReader:
    """Cuts a tile, and changes it if it is a copy."""

    first_copy: int
    copied: list[Place]

    def where(self, tile: Tile) -> str:
        return tile.name

    def read(self, tile: Tile) -> npt.NDArray[np.uint8]:
        about = tile.meta
        place = Place(
            str(about["path"]), float(about["cx"]), float(about["cy"]), int(about["window"]), int(about["angle"])
        )
        copy = tile.row - self.first_copy
        if copy < 0:
            return pixels_of(place)
        change, shift = list(KINDS.values())[copy % len(KINDS)]
        other = self.copied[(copy + 1) % len(self.copied)]
        return np.ascontiguousarray(change(pixels_of(place, shift), pixels_of(other)))


def different_images(folders: Iterable[str]) -> list[str]:
    """Paths of the images that are no copies of others, in a random order."""
    paths = [str(path) for folder in folders for path in image_paths(folder)]
    repeated = copied(_opened(path) for path in paths)
    kept = [path for number, path in enumerate(paths) if number not in repeated]
    return [kept[number] for number in np.random.default_rng(0).permutation(len(kept))]


def chosen(paths: Iterable[str], count: int) -> list[Place]:
    """A random ``count`` of the places in some images."""
    places = [place for path in paths for place in _places(path)]
    if len(places) < count:
        raise SystemExit(f"{len(places)} tiles of {count}: give more images")
    return [places[number] for number in np.random.default_rng(1).permutation(len(places))[:count]]


def _places(path: str) -> Iterator[Place]:
    with Image.open(path) as image:
        width, height = image.size
    for window in _WINDOWS:
        for angle in _ANGLES:
            turn = math.radians(angle)
            half = (window / 2 + _MARGIN * window / SIDE) * (math.cos(turn) + math.sin(turn))
            for y in np.arange(half, height - half, _APART * window):
                for x in np.arange(half, width - half, _APART * window):
                    yield Place(path, round(float(x)), round(float(y)), window, angle)


def pixels_of(place: Place, shift: tuple[int, int] = (0, 0)) -> npt.NDArray[np.uint8]:
    """Pixels of a place, shifted by rows and columns of the tile."""
    scale, turn = place.window / SIDE, math.radians(place.angle)
    cos, sin = scale * math.cos(turn), scale * math.sin(turn)
    down, right = shift[0] - SIDE / 2, shift[1] - SIDE / 2
    matrix = (cos, -sin, place.x + cos * right - sin * down, sin, cos, place.y + sin * right + cos * down)
    cut = _image(place.path).transform((SIDE, SIDE), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return np.asarray(cut)


def _opened(path: str) -> npt.NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


@cache
def _image(path: str) -> Image.Image:
    return Image.fromarray(_opened(path))


def main() -> None:
    """Print how many copies of each change are among the pairs, and the pairs of other tiles."""
    with Path(sys.argv[1]).open(newline="") as file:
        pairs = [(row["key_a"], row["key_b"], row["correlation"]) for row in csv.DictReader(file)]
    right: Counter[int] = Counter()
    wrong = []
    for a, b, correlation in pairs:
        kind, _, original = b.removeprefix("copy-").partition("-of-")
        if original == a:
            right[int(kind)] += 1
        else:
            wrong.append((correlation, a, b))
    for number, name in enumerate(KINDS):
        sys.stdout.write(f"{name:46s} {right[number]} of {_COPIES}\n")
    sys.stdout.write(f"{len(wrong)} other pairs\n")
    sys.stdout.writelines("  ".join(pair) + "\n" for pair in sorted(wrong, reverse=True))


if __name__ == "__main__":
    main()
