"""Find which of the tiles to embed an encoder was trained on.

A part may be made by any process and any attempt, so this looks at a sample of the tiles beforehand instead.

Legend: N tiles of the sample, H, W height and width in pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ca2cl.data.fingerprints.seen import Fingerprints, fingerprints_of
from ca2cl.data.fingerprints.survey import digest_of
from ca2cl.data.fingerprints.thumbnails import thumbnails
from ca2cl.data.loading.stream import UndecodableError
from ca2cl.evaluation.embed.tiles import BlurredTile, TileData, TilePlace
from ca2cl.evaluation.leaks.pretraining import Pretrained, compare_seen
from ca2cl.evaluation.leaks.wording import of_pretraining
from ca2cl.slides.readers.base import SlideError

logger = logging.getLogger(__name__)
_SAMPLE = 2048
_WARNING = "scores made of these vectors say little about new tiles"


def find_seen(data: TileData, found: Pretrained) -> dict[str, Any]:
    """What ``compare_seen`` finds in up to 2,048 tiles, evenly spaced; slides are compared in all tiles of shards.

    Args:
        data: the tiles.
        found: the encoder.

    Raises:
        InputError: a file cannot be read.
    """
    same = data.manifest_digest in found.card.manifests
    if found.seen is None:
        known = [data.manifest_digest] if data.manifest_digest else []
        return {**compare_seen(found, [], [], None, str, known=known), "same_manifest": same}
    numbers = np.unique(np.linspace(0, max(len(data) - 1, 0), min(_SAMPLE, len(data))).astype(int))
    out_HWC = np.empty((*data.tile_size, 3), np.uint8)
    keys: list[str] = []
    groups: list[str | None] = []
    pixels: list[bytes] = []
    prints: list[Fingerprints] = []
    for number in numbers:
        try:
            row, other_HWC = data.fill(int(number), out_HWC)
        except (UndecodableError, BlurredTile, SlideError):  # met again where it counts
            continue
        tile_HWC = np.ascontiguousarray(out_HWC if other_HWC is None else other_HWC)
        keys.append(row.key)
        groups.append(_group(row.place, found) if row.place else data.group(int(number)))
        pixels.append(digest_of(tile_HWC))
        prints.append(fingerprints_of(thumbnails(torch.from_numpy(tile_HWC)[None])))
    fingerprints = np.concatenate(prints) if prints else None
    part = compare_seen(found, groups, pixels, fingerprints, keys.__getitem__)
    return {**part, "tiles": len(keys), "same_manifest": same}


def _group(place: TilePlace, found: Pretrained) -> str | None:
    """Patient or slide: whichever the encoder has seen, if any."""
    assert found.seen is not None
    names = [place.patient, place.slide]
    return next((name for name, seen in zip(names, found.seen.has_groups(names), strict=True) if seen), place.slide)


def seen_lines(part: Mapping[str, Any], tiles: int) -> list[str]:
    """Lines about what ``find_seen`` found, for the terminal.

    Args:
        part: what it found.
        tiles: number of all tiles of the source.
    """
    looked = part.get("tiles", 0)
    if part.get("same_manifest"):
        return [f"LEAK: the encoder was trained on these very shards, by their digest; {_WARNING}"]
    of = f" of {looked} tiles" + (f" looked at, of {tiles}" if looked < tiles else "")
    return [f"LEAK: {line}; {_WARNING}" for line in of_pretraining("the encoder", part, of, "the source")]
