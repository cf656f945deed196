"""Compare tiles with those that an encoder was pre-trained on.

Legend: N tiles, D length of a fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ca2cl.data.fingerprints.seen import Fingerprints, Seen
from ca2cl.evaluation.leaks.wording import NAMED
from ca2cl.models.encoder_card import EncoderCard


class Pretrained(Protocol):
    """An encoder, as far as its training data are concerned."""

    @property
    def card(self) -> EncoderCard:
        """Names the manifests."""

    @property
    def seen(self) -> Seen | None:
        """Digests and fingerprints of their tiles, where they were kept."""


def trained_on(encoders: Mapping[str, Pretrained], digest: str) -> list[str]:
    """Those of the encoders that were trained on the shards with this digest, whether with labels or without."""
    return [title for title, found in encoders.items() if digest in found.card.manifests]


def compare_seen(
    found: Pretrained,
    groups: Sequence[str | None],
    pixels: Sequence[bytes],
    fingerprints_ND: Fingerprints | None,
    name: Callable[[int], str],
    *,
    known: Sequence[str] = (),
) -> dict[str, Any]:
    """Slides and tiles that an encoder has seen, for JSON.

    Args:
        found: the encoder.
        groups: slide or patient of each tile.
        pixels: digest of each tile's pixels.
        fingerprints_ND: of the tiles; none compares equal pixels alone.
        name: gives a tile's key by its row.
        known: digests of manifests that the tiles were compared with otherwise.
    """
    seen = found.seen
    covered = (*known, *(seen.manifests if seen else ()))
    unknown = [digest for digest in dict.fromkeys(found.card.manifests) if digest not in covered]
    if seen is None:
        return {"unknown_manifests": unknown}
    of_slides_N = seen.has_groups(groups)
    slides = sorted({str(group) for group, shared in zip(groups, of_slides_N, strict=True) if shared})
    equal_N = seen.has_pixels(pixels)
    copies_N = seen.has_copies(fingerprints_ND) if fingerprints_ND is not None else np.zeros(len(pixels), bool)
    shared = sorted(name(int(row)) for row in np.flatnonzero(equal_N | copies_N))
    return {
        "seen_tiles": sum(shards.tiles for shards in seen.shards),
        "compared_tiles": sum(shards.read for shards in seen.shards),
        "slides": len(slides),
        "slides_first": slides[:NAMED],
        "test_tiles_of_slides": int(of_slides_N.sum()),
        "equal_test_tiles": int(equal_N.sum()),
        "copied_test_tiles": int((copies_N & ~equal_N).sum()),
        "test_tiles_first": shared[:NAMED],
        "unknown_manifests": unknown,
    }
