"""Read a slide's thumbnail again, after its tiles are embedded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ca2cl.common.scratch import scratch_folder
from ca2cl.slides.listing import SlideFile, is_remote
from ca2cl.slides.readers.open import open_slide
from ca2cl.slides.scan import read_overview
from ca2cl.slides.stage import fetch_slide


def read_thumbnail(slide: SlideFile, mpp: float, side: int) -> tuple[npt.NDArray[np.uint8], float]:
    """The slide with ``side`` pixels along its longer side, (H, W, 3), and level-0 pixels to a pixel of it.

    Args:
        slide: a local file, or a URL that is fetched for it.
        mpp: micrometres a pixel of level 0.
        side: in pixels.

    Raises:
        SlideError: it cannot be read.
    """
    with scratch_folder() as scratch:
        path = Path(slide.path)
        if is_remote(slide.path):
            path = scratch / "slide" / path.name
            fetch_slide(slide, path)
        reader = open_slide(path)
        try:
            whole = reader.levels[0]
            scale = max(whole.width, whole.height) / side
            pixels = read_overview(reader, mpp, mpp * max(scale, 1.0))
        finally:
            reader.close()
    if scale >= 1:
        return pixels, scale
    size = round(whole.width / scale), round(whole.height / scale)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)), scale
