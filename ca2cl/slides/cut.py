"""Cut and encode the tiles of a slide."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from ca2cl.data.encode import encode_pixels
from ca2cl.slides.readers.open import opened_slide
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
    reader = opened_slide(path, tuple(scan.state))
    first = piece * PIECE
    tiles: dict[int, bytes] = {}
    blurred = 0
    for place, pixels in scan.grid.read_tiles(reader, scan.kept[first : first + PIECE]):
        if is_sharp(pixels, mpp, sharpness):
            tiles[first + place] = encode_pixels(np.ascontiguousarray(pixels), form, quality)
        else:
            blurred += 1
    numbers = sorted(tiles)
    data = [tiles[number] for number in numbers]
    seconds = round(time.perf_counter() - started, 3)
    found = Piece(numbers, [len(tile) for tile in data], blurred, seconds)
    staging.write_piece(slide, piece, b"".join(data), found)
