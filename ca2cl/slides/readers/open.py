"""Open a slide with the first reader that can."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from ca2cl.slides.readers.base import SlideError, SlideReader
from ca2cl.slides.readers.openslide import OpenSlideReader
from ca2cl.slides.readers.picture import PictureReader
from ca2cl.slides.readers.tiff import TiffReader

PYRAMIDS = frozenset({"svs", "ndpi", "mrxs", "scn", "bif", "vms", "vmu", "svslide", "czi", "dcm", "tif", "tiff"})
PICTURES = frozenset({"png", "jpg", "jpeg", "bmp", "webp"})
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def opened_slide(path: Path, state: tuple[int, ...]) -> SlideReader:
    """As ``open_slide``; kept open for the next tiles of the slide.

    Args:
        path: the slide.
        state: size and modification time, so that a changed file is opened again.
    """
    return _opened(path, state, os.getpid())


@lru_cache(maxsize=2)
def _opened(path: Path, state: tuple[int, ...], process: int) -> SlideReader:
    """A slide of a process: a forked one must not read through its parent's open file."""
    del state, process
    return open_slide(path)


def open_slide(path: Path) -> SlideReader:
    """The slide at ``path``.

    Raises:
        SlideError: it is missing, or no reader opens it.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise SlideError(f"{path}: cannot be read ({error.strerror}); restore it or take it off the list") from None
    if path.suffix[1:].lower() in PICTURES:
        return PictureReader(path)
    try:
        slide = OpenSlideReader(path)
    except SlideError as error:
        if head not in _TIFF:
            raise SlideError(f"{error}; restore it, convert it to a pyramidal TIFF, or take it off the list") from None
        return _second(path, error)
    if not slide.is_ome:
        return slide
    slide.close()
    return TiffReader(path)


def _second(path: Path, first: SlideError) -> SlideReader:
    """The TIFF file that OpenSlide refused by this error."""
    try:
        slide = TiffReader(path)
    except SlideError as error:
        raise SlideError(f"{first}, and {str(error).removeprefix(f'{path}: ')}") from None
    slide.hint = slide.hint or str(first).removeprefix(f"{path}: ")
    return slide
