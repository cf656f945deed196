"""Cut and encode the tiles of a slide."""

from __future__ import annotations

import os
import time
from functools import lru_cache
from pathlib import Path

import numpy as np

from ca2cl.data.encode import encode_pixels
from ca2cl.slides.readers.base import SlideReader
from ca2cl.slides.readers.open import open_slide
from ca2cl.slides.staging import PIECE, Piece, Staging
from ca2cl.slides.tissue.sharpness import is_sharp


def cut_piece(
    staging: Staging, slide: int, piece: int, path: Path, mpp: float, sharpness: float | None, form: str, quality: int
) -> None:
    """Write the tiles of one piece, unless an earlier run has.

    Args:
        staging: the job's files, with the slide's scan.
        slide, piece: numbers.
        path: the slide.
        mpp: micrometres a pixel of the tiles.
        sharpness: least one of a tile; None takes the default, 0 keeps all.
        form: ``jpeg``, ``webp`` or ``png``.
        quality: of jpeg and webp.

    Raises:
        SlideError: a tile does not decode.
        InputError: the piece cannot be written.
    """
    if staging.read_piece(slide, piece) is not None:
        return
    started = time.perf_counter()
    scan = staging.read_scan(slide)
    assert scan is not None and scan.grid is not None
    reader = opened(path, os.getpid())
    corners = scan.grid.corners()
    numbers, tiles, blurred = [], [], 0
    for number in range(piece * PIECE, min((piece + 1) * PIECE, len(scan.kept))):
        column, row = corners[scan.kept[number]].tolist()
        pixels = scan.grid.read(reader, column, row)
        if not is_sharp(pixels, mpp, sharpness):
            blurred += 1
            continue
        numbers.append(number)
        tiles.append(encode_pixels(np.ascontiguousarray(pixels), form, quality))
    seconds = round(time.perf_counter() - started, 3)
    found = Piece(numbers, [len(tile) for tile in tiles], blurred, seconds)
    staging.write_piece(slide, piece, b"".join(tiles), found)


@lru_cache(maxsize=2)
def opened(path: Path, process: int) -> SlideReader:
    """The slide, kept open for its next tiles.

    Args:
        path: of the slide.
        process: this one's number: a forked child must not read through its parent's open file.
    """
    del process
    return open_slide(path)
