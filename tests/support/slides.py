"""Slides made for tests: Aperio's TIFF, generic TIFF and OME-TIFF, with smooth stained tissue on white glass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Pixels = npt.NDArray[np.uint8]


def tissue_picture(width: int, height: int, seed: int = 0) -> Pixels:
    """Pink and purple blobs on white glass, (height, width, 3); tissue from the left upper corner on."""
    random = np.random.default_rng(seed)
    texture = ndimage.gaussian_filter(random.standard_normal((height, width)), 1.5) * 6
    texture = np.clip(texture + ndimage.gaussian_filter(random.standard_normal((height, width)), 6) * 20, -1, 1)
    pink, purple = np.array([226.0, 140, 190]), np.array([96.0, 60, 140])
    stained = pink + (purple - pink) * (texture[..., None] > 0.2)
    stained += 20 * texture[..., None]
    y, x = np.mgrid[:height, :width]
    inside = ((x / width) ** 2 + (y / height) ** 2 < 0.6)[..., None]
    return np.where(inside, np.clip(stained, 0, 255), 245).astype(np.uint8)


def halved(pixels: Pixels, times: int = 1) -> Pixels:
    """Means of squares of 2 x 2 pixels, ``times`` over."""
    for _ in range(times):
        height, width = (side // 2 * 2 for side in pixels.shape[:2])
        found = pixels[:height, :width].reshape(height // 2, 2, width // 2, 2, 3).mean((1, 3))
        pixels = np.rint(found).astype(np.uint8)
    return pixels


def write_svs(
    path: Path,
    pixels: Pixels,
    mpp: float | None,
    *,
    levels: Sequence[int] = (),
    compression: str = "deflate",
    photometric: str = "rgb",
) -> Path:
    """An Aperio slide with these ``levels`` (times halved) below the first; without MPP if that is None."""
    import tifffile

    about = "Aperio Image Library v11.2.1\r\n{0}x{1} ({2}) |AppMag = 20" + (f"|MPP = {mpp}" if mpp else "")
    with tifffile.TiffWriter(path, bigtiff=False) as tiff:
        for times in (0, *levels):
            picture = halved(pixels, times)
            height, width, _ = picture.shape
            tiff.write(
                picture, tile=(240, 240), photometric=photometric, compression=compression, metadata=None,
                description=about.format(width, height, "tiled"), subfiletype=0,
            )  # fmt: skip
    return path


def write_ome(path: Path, pixels: Pixels, mpp: float | None, *, levels: Sequence[int] = ()) -> Path:
    """An OME-TIFF with its pyramid in sub-images, which OpenSlide does not read."""
    import tifffile

    facts: dict[str, Any] = {"axes": "CYX"}
    if mpp:
        facts |= {"PhysicalSizeX": mpp, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": mpp, "PhysicalSizeYUnit": "µm"}
    with tifffile.TiffWriter(path, ome=True) as tiff:
        options: dict[str, Any] = {
            "tile": (128, 128),
            "photometric": "rgb",
            "planarconfig": "separate",
            "compression": "deflate",
        }
        tiff.write(np.moveaxis(pixels, -1, 0), subifds=len(levels), metadata=facts, **options)
        for times in levels:
            tiff.write(np.moveaxis(halved(pixels, times), -1, 0), subfiletype=1, **options)
    return path


def write_flat_tiff(path: Path, pixels: Pixels, mpp: float | None = None) -> Path:
    """A TIFF in strips, which OpenSlide does not read; with a resolution tag if ``mpp`` is given."""
    import tifffile

    resolution: dict[str, Any] = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"} if mpp else {}
    tifffile.imwrite(path, pixels, photometric="rgb", metadata=None, **resolution)
    return path
