"""False alarms of the search for copies, on pieces of real tiles.

    python -m benchmarks.leak_alarms SHARDS_OR_FOLDER ... [--side 74] [--sheet alarms.png]

Every image is cut into squares of ``--side`` pixels that do not overlap, and every square is looked for among all of
them. An image that is a copy of another one is left out with it. Every pair that is found goes onto the sheet: whether
it is a false alarm, or tissue that the images repeat, is for the eye to say.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ca2cl.data.fingerprints.nearest import Known, find_copies
from ca2cl.data.fingerprints.thumbnails import is_flat, thumbnails
from ca2cl.data.loading.sequential import iterate_tiles
from ca2cl.data.remote.reader import ShardReader, open_index

Pixels = npt.NDArray[np.uint8]
Pair = tuple[int, int, float]
CPU = torch.device("cpu")
_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif")
_DRAWN, _GAP, _LINE, _ACROSS = 148, 8, 14, 6
_MOST = 120
"""Pairs of a sheet."""


def main() -> None:
    """Print how many pieces are called copies of others, and draw these."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sources", nargs="+", help="shards, or folders of images")
    parser.add_argument("--side", type=int, default=74)
    parser.add_argument("--sheet", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = {name: image for source in options.sources for name, image in read_images(source)}
    repeated = copied(list(images.values()))
    kept = {name: image for number, (name, image) in enumerate(images.items()) if number not in repeated}
    names = [f"{name} {row},{column}" for name, image in kept.items() for row, column in corners(image, options.side)]
    pieces = np.concatenate([cut(image, options.side) for image in kept.values()])
    small = small_of(pieces)
    flat = int(is_flat(small).sum())
    _say(f"{len(images)} images, {len(repeated)} left out as copies; {len(pieces)} pieces, {flat} without structure")
    started = time.process_time()
    pairs = found_within(small)
    _say(f"searched in {time.process_time() - started:.0f} s of CPU")
    called = len({piece for pair in pairs for piece in pair[:2]})
    _say(f"{len(pairs)} pairs; {called} of {len(pieces) - flat} pieces are called a copy of another")
    for one, two, correlation in pairs:
        _say(f"  {correlation:.3f}  {names[one]}  {names[two]}")
    _say(f"none false would put the rate below {-math.log(0.05) / (len(pieces) - flat):.2g} (95 %)")
    if options.sheet and pairs:
        draw(options.sheet, pieces, pairs[:_MOST], names)


def read_images(source: str) -> Iterator[tuple[str, Pixels]]:
    """Name and pixels (H, W, 3) of the tiles of some shards, or of the images in a folder without annotations."""
    if (Path(source) / "manifest.json").exists():
        index = open_index(source, None)
        keys = [key for shard in index for key in shard.key]
        for tiles, _, samples in iterate_tiles(index, ShardReader(source, None, index=index), np.arange(len(index))):
            yield from zip((keys[sample] for sample in samples.tolist()), tiles.numpy().copy(), strict=True)
        return
    for path in image_paths(source):
        with Image.open(path) as image:
            yield path.stem, np.array(image.convert("RGB"))


def image_paths(folder: str) -> list[Path]:
    """Images in a folder and the folders in it, without annotations; sorted."""
    found = sorted(Path(folder).rglob("*"))
    return [path for path in found if path.suffix.lower() in _SUFFIXES and not path.stem.endswith("_anno")]


def copied(images: Iterable[Pixels]) -> set[int]:
    """Numbers of the images that are a copy of another one."""
    small = torch.cat([small_of(image[None]) for image in images])
    return {number for one, two, _ in found_within(small) for number in (one, two)}


def corners(image: Pixels, side: int) -> list[tuple[int, int]]:
    """Upper left corners of the squares of an image."""
    height, width = image.shape[:2]
    return [(y, x) for y in range(0, height - side + 1, side) for x in range(0, width - side + 1, side)]


def cut(image: Pixels, side: int) -> Pixels:
    """Squares (N, side, side, 3) of an image that do not overlap."""
    squares = [image[y : y + side, x : x + side] for y, x in corners(image, side)]
    return np.stack(squares) if squares else np.zeros((0, side, side, 3), np.uint8)


def small_of(tiles_BHWC: Pixels) -> Tensor:
    """Thumbnails of tiles."""
    parts = torch.split(torch.from_numpy(np.ascontiguousarray(tiles_BHWC)), 256)
    return torch.cat([thumbnails(part) for part in parts])


def found_within(small: Tensor) -> list[Pair]:
    """Pairs of numbers and their correlation within one set, the surest first."""
    copies = find_copies(small, Known(small, CPU))
    rows = zip(copies.query_P.tolist(), copies.known_P.tolist(), copies.correlation_P.tolist(), strict=True)
    pairs: dict[tuple[int, int], float] = {}
    for query, known, correlation in rows:
        if query != known:
            at = min(query, known), max(query, known)
            pairs[at] = max(correlation, pairs.get(at, -1.0))
    return sorted(((*at, correlation) for at, correlation in pairs.items()), key=lambda pair: -pair[2])


def draw(path: Path, pieces: Pixels, pairs: Sequence[Pair], names: Sequence[str]) -> None:
    """Draw both pieces of every pair, six pairs across."""
    width, height = 2 * _DRAWN + 3 * _GAP, _DRAWN + 3 * _LINE
    sheet = Image.new("RGB", (width * _ACROSS, height * -(-len(pairs) // _ACROSS)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (one, two, correlation) in enumerate(pairs):
        left, top = width * (place % _ACROSS), height * (place // _ACROSS)
        for offset, piece in ((0, one), (_DRAWN + _GAP, two)):
            sheet.paste(Image.fromarray(pieces[piece]).resize((_DRAWN, _DRAWN)), (left + offset, top))
        pen.text((left, top + _DRAWN), f"{names[one][-40:]}\n{names[two][-32:]}  {correlation:.2f}", fill="black")
    sheet.save(path)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
