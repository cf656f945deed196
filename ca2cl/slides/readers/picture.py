"""PNG, JPEG, BMP and WebP images as slides of one level."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ca2cl.slides.readers.base import WHITE, Level, Pixels, SlideError, one_line, sampled_digest

_MOST_PIXELS = 1 << 29
"""Half a billion: 1.6 GB of RGB in memory."""


class PictureReader:
    """An image that is decoded as a whole.

    Raises:
        SlideError: it does not decode, or has too many pixels.
    """

    def __init__(self, path: Path) -> None:
        try:
            with Image.open(path, formats=["PNG", "JPEG", "BMP", "WEBP"]) as image:
                if image.width * image.height > _MOST_PIXELS:
                    raise SlideError(
                        f"{path}: {image.width} x {image.height} pixels in one piece; save it as a tiled TIFF"
                    )
                self._pixels: Pixels = np.asarray(image.convert("RGB"))
        except SlideError:
            raise
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise SlideError(f"{path}: not an image that Pillow decodes ({one_line(error)})") from None
        height, width, _ = self._pixels.shape
        self.levels: tuple[Level, ...] = (Level(width, height, 1.0),)
        self.mpp: float | None = None
        self.hint = ""
        self.bounds = 0, 0, width, height
        self.vendor = "image"
        self.digest = sampled_digest(path)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """As ``SlideReader.read``."""
        del level
        out = np.full((height, width, 3), WHITE, np.uint8)
        left, top = max(x, 0), max(y, 0)
        found = self._pixels[top : max(y + height, 0), left : max(x + width, 0)]
        out[top - y : top - y + found.shape[0], left - x : left - x + found.shape[1]] = found
        return out

    def close(self) -> None:
        """Nothing is open."""
