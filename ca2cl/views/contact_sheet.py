"""Contact sheet of views: tiles beside their strong and weak views."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ca2cl.config import IMAGENET_MEAN, IMAGENET_STD, ViewsConfig
from ca2cl.data.loading.sequential import iterate_tiles
from ca2cl.data.remote.reader import ShardReader, open_index
from ca2cl.data.shards.index import ShardIndex, key_hash
from ca2cl.errors import InputError
from ca2cl.views.build import Views, build_views

_MARGIN, _LINE, _TITLE = 6, 16, 26
_SMALLEST = 96


def contact_sheet(
    tiles_BHWC: Tensor, key_hash_B: Tensor, views: Views, out: str | Path, *, labels: Sequence[str], epochs: int = 2
) -> Path:
    """Draw original | strong | weak | strong | weak … as a PNG.

    Args:
        tiles_BHWC: uint8 (B, H, W, 3).
        key_hash_B: int64 (B,), as the training stream gives them: the sheet shows what a run sees.
        views: what to show.
        out: the PNG to write; its folder is made.
        labels: what to write under each original.
        epochs: how many epochs' views to show, from epoch 0.

    Returns:
        The path written.

    Raises:
        InputError: the PNG cannot be written.
    """
    columns = [("original", _enlarge(tiles_BHWC.cpu().numpy()))]
    for epoch in range(epochs):
        for name, batch in zip(("strong", "weak"), views.raw(tiles_BHWC, key_hash_B, epoch), strict=True):
            columns.append((f"{name}, epoch {epoch}", _enlarge(batch.cpu().numpy())))
    title = f"recipe {views.recipe.name}, {views.recipe.size} px, seed {views.seed}"
    sheet = _draw(columns, labels, title)
    path = Path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path, format="PNG")
    except OSError as error:
        raise InputError(f"{path}: cannot write the sheet ({error.strerror or error}); give another path") from None
    return path


def _enlarge(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Small images repeated pixel by pixel, so that what is seen is what the encoder gets."""
    times = max(1, -(-_SMALLEST // images.shape[1]))
    return images.repeat(times, axis=1).repeat(times, axis=2)


def _draw(columns: list[tuple[str, npt.NDArray[np.uint8]]], labels: Sequence[str], title: str) -> Image.Image:
    height = max(images.shape[1] for _, images in columns) + _LINE + _MARGIN
    widths = [images.shape[2] + _MARGIN for _, images in columns]
    top = _TITLE + _LINE
    sheet = Image.new("RGB", (sum(widths) + _MARGIN, top + height * len(labels) + _MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    draw.text((_MARGIN, _MARGIN), title, fill="black", font=font)
    left = _MARGIN
    for (name, images), width in zip(columns, widths, strict=True):
        draw.text((left, _TITLE), name, fill="black", font=font)
        for row, image in enumerate(images):
            sheet.paste(Image.fromarray(image), (left, top + row * height))
        left += width
    for row, label in enumerate(labels):
        draw.text((_MARGIN, top + (row + 1) * height - _LINE - _MARGIN + 2), label, fill="black", font=font)
    return sheet


def run_sheet(
    shards: str,
    out: str,
    *,
    config: ViewsConfig | None = None,
    image_size: int = 224,
    count: int = 8,
    seed: int = 0,
    cache_dir: str | None = None,
) -> Path:
    """The contact sheet of a shard folder, its tiles spread evenly over the classes: ``ca2cl doctor --views``.

    Args:
        shards: folder or URL that ``ca2cl shard`` wrote.
        out: the PNG to write.
        config: which views.
        image_size: their side in pixels.
        count: most tiles to show.
        seed: of the views.
        cache_dir: where remote shards are kept.

    Returns:
        The path written.

    Raises:
        InputError: no shards there, no tile in them, or the PNG cannot be written.
    """
    index = open_index(shards, cache_dir)
    if len(index) == 0:
        raise InputError(f"{shards}: holds no tile; write the folder again with `ca2cl shard`")
    views = build_views(config or ViewsConfig(), image_size, mean=IMAGENET_MEAN, std=IMAGENET_STD, seed=seed)
    chosen = _spread(index.labels(), count)
    batches = list(iterate_tiles(index, ShardReader(shards, cache_dir, index=index), chosen, batch_size=count))
    if not batches:
        raise InputError(f"{shards}: none of the tiles tried decodes; write the folder again with `ca2cl shard`")
    tiles, labels, samples = (torch.cat(part) for part in zip(*batches, strict=True))
    keys = [_key(index, sample) for sample in samples.tolist()]
    names = [index.classes[label] if label >= 0 else key for label, key in zip(labels.tolist(), keys, strict=True)]
    return contact_sheet(tiles, torch.tensor([key_hash(key) for key in keys]), views, out, labels=names)


def _spread(labels: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Up to ``count`` sample numbers, one class after another in turn, ascending."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels[order])
    turn = np.arange(len(order)) - starts
    return np.sort(order[np.argsort(turn, kind="stable")[:count]])


def _key(index: ShardIndex, sample: int) -> str:
    shard, row = index.locate(sample)
    return str(index.samples(shard).key[row])
