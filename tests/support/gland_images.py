"""Synthetic gland images with instance masks, in the GlaS layout."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image as PILImage

from ca2cl.common.files import fresh_folder
from ca2cl.data.synthetic.glands import lay_glands, paint_glands
from ca2cl.data.synthetic.painting import Image, noise, render
from ca2cl.errors import InputError

GRADE_COLUMNS = ("name", "patient ID", " grade (GlaS)", " grade (Sirinukunwattana et al. 2015)")


def draw_glands(seed: int, height: int, width: int) -> tuple[Image, npt.NDArray[np.uint16]]:
    """One image of glands and its mask; a pure function of its arguments.

    Returns:
        uint8 (H, W, 3) RGB, and uint16 (H, W) instance numbers 1 to N, 0 in the stroma. Each instance is one
        4-connected region, its lumen included; neighbours may touch.

    Raises:
        InputError: a negative seed, or a side of fewer than 32 pixels.
    """
    if seed < 0 or min(height, width) < 32:
        raise InputError(f"glands: seed={seed}, {height}x{width}; give seed >= 0 and 32 px or more")
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, height, width, 1])))
    unit, shape = float(rng.uniform(1.8, 2.6)), (height, width)
    spacing = min(unit * rng.uniform(36, 52), max(min(shape) * 0.7, 8.0))
    glands = lay_glands(rng, shape, spacing, rng.uniform(0.85, 1.15), rng.uniform(0.05, 0.16))
    sizes = np.bincount(glands.owner.ravel())
    # A few pixels of a gland at the border are no instance that a detector could find.
    owner = np.where(sizes[glands.owner] >= (spacing / 5) ** 2, glands.owner, 0)
    glands = glands._replace(owner=owner)
    haematoxylin, eosin = paint_glands(rng, glands, unit, rng.uniform(0.25, 0.5))
    stain = rng.uniform(0.75, 1.15, 2)
    image = render(stain[0] * haematoxylin, stain[1] * eosin, 1 + 0.015 * noise(rng, shape, 1.5))
    _, mask = np.unique(np.concatenate([[0], owner.ravel()]), return_inverse=True)
    return image, mask.ravel()[1:].reshape(shape).astype(np.uint16)


def write_glands(
    root: Path, train: int, test: int, height: int = 522, width: int = 775, seed: int = 0, suffix: str = ".bmp"
) -> Path:
    """Write ``train_N``, ``testA_N``, their ``_anno`` masks (uint8 instance numbers) and ``Grade.csv``, as in GlaS.

    Args:
        root: a folder that does not exist yet or is empty; it appears complete or not at all.
        train, test: numbers of images, at least 1 and 0.
        suffix: ``.bmp`` as in the challenge's archive, or ``.png``.

    Raises:
        InputError: a bad count, size, seed or suffix, more than 255 glands in one image, or ``root`` is not empty.
    """
    if train < 1 or test < 0:
        raise InputError(f"glands: train={train}, test={test}; give train >= 1 and test >= 0")
    if suffix not in (".bmp", ".png"):
        raise InputError(f"glands: suffix={suffix!r} loses the masks' numbers or is unknown; give .bmp or .png")
    names = [f"train_{n}" for n in range(1, train + 1)] + [f"testA_{n}" for n in range(1, test + 1)]
    with fresh_folder(Path(root)) as folder:
        for number, name in enumerate(names):
            image, mask = draw_glands((seed << 32) + number, height, width)
            if mask.max() > 255:
                raise InputError(
                    f"glands: {height}x{width} holds {mask.max()} glands, a mask at most 255; give a smaller size"
                )
            PILImage.fromarray(image).save(folder / f"{name}{suffix}")
            PILImage.fromarray(mask.astype(np.uint8)).save(folder / f"{name}_anno{suffix}")
        with (folder / "Grade.csv").open("w", newline="", encoding="utf-8") as stream:
            rows = csv.writer(stream)
            rows.writerow(GRADE_COLUMNS)
            rows.writerows([name, number + 1, " benign", " healthy"] for number, name in enumerate(names))
    return Path(root)
