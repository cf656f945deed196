"""Small images with masks of glands, in the layouts that they are published in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Mask = npt.NDArray[Any]


def disc(mask: Mask, number: int, y: float, x: float, radius: float) -> None:
    """Draw a disc into a mask."""
    rows, columns = np.ogrid[: mask.shape[0], : mask.shape[1]]
    mask[(rows - y) ** 2 + (columns - x) ** 2 <= radius**2] = number


def gland_mask(dtype: type = np.uint8, shape: tuple[int, int] = (60, 80)) -> Mask:
    """Instance 3 has a hole, 7 touches it, 9 comes in two large parts, 20 lies at the border."""
    mask = np.zeros(shape, dtype)
    disc(mask, 3, 20, 20, 14)
    disc(mask, 0, 20, 20, 5)
    disc(mask, 7, 20, 45, 11)
    disc(mask, 9, 45, 20, 7)
    disc(mask, 9, 45, 50, 7)
    disc(mask, 20, 50, shape[1] - 1, 9)
    return mask


def save_pair(image: Path, mask: Path, ids: Mask, seed: int = 0) -> None:
    """An image of noise and its mask."""
    for path in (image, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*ids.shape, 3), np.uint8)
    Image.fromarray(pixels).save(image)
    Image.fromarray(ids).save(mask)


def write_pairs(root: Path, names: list[str], images: str = "images", masks: str = "masks") -> Path:
    """The layout ``masks``, or a split of CRAG's."""
    for seed, name in enumerate(names):
        save_pair(root / images / f"{name}.png", root / masks / f"{name}.png", gland_mask(), seed)
    return root


def write_crag(root: Path) -> Path:
    """CRAG as it unzips: a folder in a folder, with the overlays that it has beside each split's masks."""
    for split, names in (("train", ["train_1", "train_2", "train_10"]), ("valid", ["test_1"])):
        write_pairs(root / "CRAG" / split, names, "Images", "Annotation")
        (root / "CRAG" / split / "Overlay").mkdir()
    (root / "__MACOSX").mkdir()
    return root
