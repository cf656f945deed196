"""PNG of pairs of tiles side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from ca2cl.common.files import writing
from ca2cl.data.loading.sequential import iterate_tiles
from ca2cl.data.remote.reader import ShardReader
from ca2cl.doctor.leaks.shared import Pair, SurveyedSet

_SIDE, _GAP, _LINE = 160, 8, 16
_ACROSS = 3
MOST = 24
_LETTERS = 24


def chosen(pairs: Sequence[Pair], most: int = MOST) -> list[Pair]:
    """The pairs of a sheet: the least certain ones and, for comparison, the most certain ones."""
    ranked = sorted(pairs, key=lambda pair: pair.correlation)
    if len(ranked) <= most:
        return ranked
    weakest = -(-2 * most // 3)
    return [*ranked[:weakest], *ranked[weakest - most :]]


def draw_pairs(path: Path, a: SurveyedSet, b: SurveyedSet, pairs: Sequence[Pair], cache_dir: str | None) -> None:
    """Draw pairs, three across, with the keys of both tiles and their correlation.

    Args:
        path: of the PNG.
        a: one set.
        b: the other.
        pairs: what to draw.
        cache_dir: for remote shards.

    Raises:
        InputError: a shard cannot be read, or the file cannot be written.
    """
    rows = -(-len(pairs) // _ACROSS)
    width, height = 2 * _SIDE + 3 * _GAP, _SIDE + 2 * _LINE + 2 * _GAP
    sheet = Image.new("RGB", (width * min(_ACROSS, len(pairs)), height * rows), "white")
    draw = ImageDraw.Draw(sheet)
    of_a = _tiles(a, [pair.a for pair in pairs], cache_dir)
    of_b = _tiles(b, [pair.b for pair in pairs], cache_dir)
    for place, pair in enumerate(pairs):
        left, top = width * (place % _ACROSS) + _GAP, height * (place // _ACROSS) + _GAP
        for offset, tile in ((0, of_a[pair.a]), (_SIDE + _GAP, of_b[pair.b])):
            sheet.paste(Image.fromarray(tile).resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), (left + offset, top))
        names = f"{a.keys[pair.a][-_LETTERS:]}    {b.keys[pair.b][-_LETTERS:]}"
        how = "equal pixels" if pair.equal else f"correlation {pair.correlation:.2f}"
        draw.text((left, top + _SIDE), names.encode("ascii", "replace").decode(), fill="black")
        turn = f", {pair.turn}" if pair.turn else ""
        draw.text((left, top + _SIDE + _LINE), f"{how}{turn}", fill="black")
    with writing(path, "give another folder with --leaks_output"):
        sheet.save(path, format="PNG")


def _tiles(side: SurveyedSet, samples: Sequence[int], cache_dir: str | None) -> dict[int, npt.NDArray[np.uint8]]:
    reader = ShardReader(side.root, cache_dir, index=side.index)
    found: dict[int, npt.NDArray[np.uint8]] = {}
    for tiles_BHWC, _, samples_B in iterate_tiles(side.index, reader, np.unique(samples), batch_size=8):
        found.update(zip(samples_B.tolist(), tiles_BHWC.numpy().copy(), strict=True))
    return found
