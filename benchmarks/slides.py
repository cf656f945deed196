"""``ca2cl shard`` of slides against the bare reading of their tiles, by format, in CPU seconds of one process.

    python -m benchmarks.slides [--formats jpeg jpeg2000 ome png] [--side 14400] [--repeats 3] [--slide FILE --mpp X]

The slides are made up: tissue at 0.5 micrometres a pixel, in tiles of 240 pixels, without a smaller level. The baseline
reads the same tiles one by one, ``numpy.asarray(slide.read_region(...).convert("RGB"))``, and writes nothing; for PNG,
which OpenSlide does not open, it is Pillow. Ours is the whole command, from the start of Python to the manifest: tiles
are read, encoded as JPEG, packed into shards, and hashed. ``rest`` is the ratio without the start, which is that of the
same command on a slide of 16 tiles.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openslide
import tifffile
from PIL import Image

from benchmarks.checkouts import HERE, python, run
from ca2cl.data.synthetic.tissue import CLASSES, draw_tile

Pixels = npt.NDArray[np.uint8]
FORMATS = ("jpeg", "jpeg2000", "ome", "png")
TILE, MPP = 224, 0.5
_BLOCK, _BLOCKS = 240, 10
_ABOUT = "Aperio Image Library v11.2.1\r\n{0}x{0} (240x240) |AppMag = 20|MPP = {1}"
_LARGEST_PNG = 9600
SETTINGS: dict[str, tuple[int, tuple[str, ...]]] = {
    "all tiles": (1, ("--tissue", "0")),
    "tissue, sharpness": (1, ()),
    "all, twice the mpp": (2, ("--tissue", "0")),
}
"""Level-0 pixels to a pixel of a tile, and flags."""


def picture() -> Pixels:
    """Made-up tissue of all classes but background, 2,400 x 2,400."""
    classes = [label for label in CLASSES if label != "BACK"]
    count = -(-_BLOCK * _BLOCKS // TILE)
    tiles = [draw_tile(classes[number % len(classes)], number, TILE) for number in range(count * count)]
    rows = [np.concatenate(tiles[start : start + count], axis=1) for start in range(0, count * count, count)]
    return np.ascontiguousarray(np.concatenate(rows)[: _BLOCK * _BLOCKS, : _BLOCK * _BLOCKS])


def _blocks(pixels: Pixels, side: int) -> Iterator[Pixels]:
    for row in range(side // _BLOCK):
        for column in range(side // _BLOCK):
            top, left = (_BLOCK * (place % _BLOCKS) for place in (row, column))
            yield pixels[top : top + _BLOCK, left : left + _BLOCK]


def write_slide(path: Path, kind: str, pixels: Pixels, side: int) -> Path:
    """A slide of ``side`` x ``side`` pixels, a multiple of 240, that repeats ``pixels``."""
    if kind == "png":
        times = -(-side // len(pixels))
        Image.fromarray(np.tile(pixels, (times, times, 1))[:side, :side]).save(path, compress_level=1)
        return path
    jpeg = {"compression": "jpeg", "compressionargs": {"level": 85}, "subsampling": (2, 2), "photometric": "ycbcr"}
    options = {
        "jpeg": jpeg,
        "ome": jpeg,
        "jpeg2000": {"compression": 33005, "compressionargs": {"level": 40}, "photometric": "rgb"},
    }[kind]
    about: dict[str, object] = {"metadata": None, "description": _ABOUT.format(side, MPP)}
    if kind == "ome":
        about = {"metadata": {"axes": "YXS", "PhysicalSizeX": MPP, "PhysicalSizeY": MPP}}
    with tifffile.TiffWriter(path, ome=kind == "ome") as tiff:
        tiff.write(
            _blocks(pixels, side), shape=(side, side, 3), dtype="uint8", tile=(_BLOCK, _BLOCK), **about, **options
        )
    return path


def _cpu() -> float:
    times = os.times()
    return times.user + times.system


def bare(path: Path, times: int) -> tuple[float, int]:
    """CPU seconds to read all tiles of a slide, and their number."""
    used, side = _cpu(), TILE * times
    read: Callable[[int, int], Image.Image]
    if path.suffix == ".png":
        Image.MAX_IMAGE_PIXELS = None
        image = Image.open(path).convert("RGB")
        width, height = image.size
        read = lambda x, y: image.crop((x, y, x + side, y + side))  # noqa: E731
    else:
        slide = openslide.OpenSlide(path)
        width, height = slide.dimensions
        read = lambda x, y: slide.read_region((x, y), 0, (side, side)).convert("RGB")  # noqa: E731
    corners = [(x, y) for y in range(0, height - side + 1, side) for x in range(0, width - side + 1, side)]
    for x, y in corners:
        np.asarray(read(x, y))
    return _cpu() - used, len(corners)


def ours(path: Path, mpp: float, flags: Sequence[str], scratch: Path) -> float:
    """CPU seconds of the whole command."""
    out = scratch / "out"
    shutil.rmtree(out, ignore_errors=True)
    words = ["-m", "ca2cl", "shard", str(path), str(out), "--mpp", str(mpp), "--tile", str(TILE), "--workers", "1"]
    if path.suffix == ".png":
        words += ["--assume_mpp", f"*={MPP}"]
    return run(python(*words, *flags), HERE, scratch)[0].cpu


def compare(name: str, path: Path, few: Path, mpp: float, repeats: int, scratch: Path) -> None:
    """Print a line for each of ``SETTINGS``."""
    for setting, (times, flags) in SETTINGS.items():
        found = []
        for _ in range(repeats):
            read, tiles = bare(path, times)
            found.append((read, ours(path, mpp * times, flags, scratch), ours(few, mpp * times, flags, scratch)))
        read, whole, start = (statistics.median(column) for column in zip(*found, strict=True))
        sys.stdout.write(
            f"{name:9} {setting:19} {tiles:6} {read / tiles * 1e3:8.2f} {whole / tiles * 1e3:8.2f} {start:7.2f} "
            f"{read / whole:6.2f} {read / max(whole - start, 1e-9):6.2f}\n"
        )
        sys.stdout.flush()


def main() -> None:
    """Make or take slides, and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="of made-up slides")
    parser.add_argument("--side", type=int, default=60 * _BLOCK, help="of made-up slides, in pixels")
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the median counts")
    parser.add_argument("--slide", type=Path, help="a slide of your own")
    parser.add_argument("--mpp", type=float, help="micrometres a pixel of its finest level")
    settings = parser.parse_args()
    sys.stdout.write("slide     tiles                count  bare ms  ours ms start s  ratio   rest\n")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        pixels = picture()
        if settings.slide is not None:
            few = write_slide(scratch / "few.svs", "jpeg", pixels, 4 * _BLOCK)
            compare("own", settings.slide, few, settings.mpp or MPP, settings.repeats, scratch)
            return
        for kind in settings.formats:
            name = {"ome": "a.ome.tif", "png": "a.png"}.get(kind, "a.svs")
            side = min(settings.side, _LARGEST_PNG) if kind == "png" else settings.side
            path = write_slide(scratch / name, kind, pixels, side)
            few = write_slide(scratch / f"few-{name}", kind, pixels, 4 * _BLOCK)
            compare(kind, path, few, MPP, settings.repeats, scratch)
            path.unlink()


if __name__ == "__main__":
    main()
