"""The contact sheet shows the tiles of a shard folder and the views that training would see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ca2cl.config import IMAGENET_MEAN, IMAGENET_STD, ViewsConfig
from ca2cl.data.shards.index import key_hash
from ca2cl.errors import InputError
from ca2cl.views.build import build_views
from ca2cl.views.contact_sheet import contact_sheet, run_sheet
from tests.support.shards import encode, random_tiles, write_shards


def _holds(sheet: np.ndarray, image: np.ndarray) -> bool:
    """Whether an image lies somewhere on the sheet, pixel for pixel."""
    height, width = image.shape[:2]
    corners = np.argwhere((sheet[: 1 - height or None, : 1 - width or None] == image[0, 0]).all(-1))
    return any(np.array_equal(sheet[y : y + height, x : x + width], image) for y, x in corners)


def test_a_sheet_of_shards_shows_originals_and_the_views_of_training(tmp_path: Path) -> None:
    tiles = random_tiles(9)
    root = write_shards(tmp_path / "data", [encode(tile) for tile in tiles])
    size = 100
    path = run_sheet(str(root), str(tmp_path / "new" / "sheet.png"), count=3, image_size=size, seed=5)
    sheet = np.asarray(Image.open(path))
    # Labels go round in threes: one tile of each class is the first of it.
    keys = torch.tensor([key_hash(f"t{number:06d}") for number in range(3)])
    views = build_views(ViewsConfig(), size, mean=IMAGENET_MEAN, std=IMAGENET_STD, seed=5)
    strong, weak = views.raw(torch.from_numpy(tiles[:3]), keys, 1)
    times = -(-96 // tiles.shape[1])
    for number in range(3):
        assert _holds(sheet, tiles[number].repeat(times, 0).repeat(times, 1))
        for view in (strong, weak):
            assert _holds(sheet, view[number].numpy())
    assert not _holds(sheet, tiles[8].repeat(times, 0).repeat(times, 1))


def test_a_sheet_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    views = build_views(ViewsConfig(recipe="crop"), 32, mean=IMAGENET_MEAN, std=IMAGENET_STD, seed=0)
    tiles = torch.zeros(1, 40, 40, 3, dtype=torch.uint8)
    with pytest.raises(InputError, match=r"x\.png: cannot write the sheet"):
        contact_sheet(tiles, torch.zeros(1, dtype=torch.int64), views, tmp_path / "file" / "x.png", labels=["a"])


def test_a_sheet_of_no_shards_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=str(tmp_path)):
        run_sheet(str(tmp_path / "none"), str(tmp_path / "sheet.png"))


def test_tiles_that_do_not_decode_are_told_apart_from_none(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "bad", [b"no image"] * 4)
    with pytest.raises(InputError, match="decodes"):
        run_sheet(str(root), str(tmp_path / "sheet.png"))
