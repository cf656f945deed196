"""Slides, equal tiles and altered copies that two sets of shards share.

Legend: P pairs of tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ca2cl.data.fingerprints.nearest import Known, find_copies
from ca2cl.data.fingerprints.survey import Survey
from ca2cl.data.fingerprints.thumbnails import is_flat
from ca2cl.data.shards.index import ShardIndex

_TURNS = ("", "columns mirrored", "rows mirrored", "180°", "transposed", "90°", "270°", "transposed, 180°")
"""Orientations of ``fingerprints.thumbnails`` in words."""


@dataclass(frozen=True)
class Pair:
    """A tile of A and one of B that show the same tissue, by sample number."""

    a: int
    b: int
    correlation: float
    equal: bool
    """The pixels are the same."""
    orientation: int
    """Of the second tile, relative to the first; bits as in ``fingerprints.thumbnails``."""

    @property
    def turn(self) -> str:
        """The orientation in words; empty where it is the same."""
        return _TURNS[self.orientation]


@dataclass(frozen=True)
class SurveyedSet:
    """A set of shards with what was read of it."""

    root: str
    index: ShardIndex
    tiles: Survey

    @cached_property
    def groups(self) -> list[str | None]:
        """Slide or patient of every sample."""
        return self.index.groups()

    @cached_property
    def keys(self) -> list[str]:
        """Key of every sample."""
        return [key for shard in self.index for key in shard.key]

    @cached_property
    def flat(self) -> int:
        """Tiles without structure, which are not compared."""
        return int(is_flat(self.tiles.thumbnails_NSS).sum())


def shared_slides(a: SurveyedSet, b: SurveyedSet) -> list[str]:
    """Names that both have, sorted."""
    return sorted({name for name in a.groups if name} & {name for name in b.groups if name})


def find_pairs(a: SurveyedSet, b: SurveyedSet, device: torch.device) -> list[Pair]:
    """Pairs of tiles, in the order of A and then of B; in one and the same set each pair once and no tile with itself.

    Args:
        a: one set.
        b: the other.
        device: where descriptors are compared.
    """
    swapped = len(a.tiles) < len(b.tiles)  # a query has 72 views, so the smaller set asks
    query, known = (a, b) if swapped else (b, a)
    copies = find_copies(
        query.tiles.thumbnails_NSS, Known(known.tiles.thumbnails_NSS, device), title="doctor: search for copies"
    )
    pairs: dict[tuple[int, int], Pair] = {}
    within = a is b
    rows = zip(copies.query_P, copies.known_P, copies.orientation_P, copies.correlation_P, strict=True)
    for asked, found, orientation, correlation in rows:
        first, second = (int(asked), int(found)) if swapped else (int(found), int(asked))
        if within and first >= second:
            continue
        equal = a.tiles.pixels_N[first] == b.tiles.pixels_N[second]
        turn = int(orientation) if swapped else _inverse(int(orientation))
        at = int(a.tiles.samples_N[first]), int(b.tiles.samples_N[second])
        pairs[at] = Pair(*at, float(correlation), equal, turn)
    return [pairs[at] for at in sorted(pairs)]


def _inverse(orientation: int) -> int:
    """The orientation that undoes one: the mirrors of a transposed picture change places."""
    if orientation & 4:
        return 4 | (orientation & 1) << 1 | (orientation & 2) >> 1
    return orientation


def regrouped(a: SurveyedSet, b: SurveyedSet, pairs: Sequence[Pair]) -> tuple[dict[str, str], dict[str, str]]:
    """Key → group for the tiles of each set whose slides share tissue, or that are copies and have no slide.

    Slides that hold copies of one another become one group, with all of their tiles.
    """
    parent: dict[str, str] = {}

    def root(node: str) -> str:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = node = parent[parent[node]]
        return node

    def node(side: SurveyedSet, sample: int, letter: str) -> str:
        return f"slide {side.groups[sample]}" if side.groups[sample] else f"tile {letter} {side.keys[sample]}"

    own = "a" if a is b else "b"
    for pair in pairs:
        one, two = sorted((root(node(a, pair.a, "a")), root(node(b, pair.b, own))))
        parent[two] = one
    names = {node: _group_name(root(node)) for node in list(parent)}
    made = []
    for side, letter in ((a, "a"), (b, own)):
        nodes = ((side.keys[sample], node(side, sample, letter)) for sample in range(len(side.keys)))
        made.append({key: names[node] for key, node in nodes if node in names})
    return made[0], made[1]


def _group_name(node: str) -> str:
    kind, _, name = node.partition(" ")
    return name if kind == "slide" else f"copies of {name.partition(' ')[2]}"


def tiles_in(pairs: Sequence[Pair], side: str) -> int:
    """Number of tiles of a side, ``a`` or ``b``, that are in any pair."""
    return len(np.unique([getattr(pair, side) for pair in pairs]))
