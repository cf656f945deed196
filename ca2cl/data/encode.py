"""Encode tiles."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

EXTENSIONS = {"jpeg": "jpg", "webp": "webp", "png": "png"}


def encode_pixels(pixels_HWC: npt.NDArray[np.uint8], form: str, quality: int) -> bytes:
    """RGB pixels as ``jpeg``, ``webp`` or ``png``; the same pixels give the same bytes.

    JPEG is 4:4:4: stain differences between neighbouring nuclei are chroma, which subsampling would halve.
    """
    if form == "jpeg":
        data: bytes = simplejpeg.encode_jpeg(pixels_HWC, quality, "RGB", "444", fastdct=False)
        return data
    out = io.BytesIO()
    Image.fromarray(pixels_HWC).save(out, form.upper(), **({"quality": quality} if form == "webp" else {}))
    return out.getvalue()
