"""Recall, false alarms and speed of the search for copies.

    python -m benchmarks.leaks --shards TEST --others TRAIN [--tiles 1000] [--search 1000000]

Every change is made to tiles of ``--shards``, which are then looked for among those of ``--shards`` and ``--others``
together. A false alarm is a changed tile that is called a copy of another tile than its own. Pairs that are found
without any change do not count: look at them with ``ca2cl doctor --leaks``, for they may be copies.
``--search`` also times a search among as many random thumbnails.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ca2cl.data.fingerprints.nearest import Copies, Known, find_copies
from ca2cl.data.fingerprints.seen import Seen, SeenShards, fingerprints_of
from ca2cl.data.fingerprints.survey import survey
from ca2cl.data.fingerprints.thumbnails import SIDE, is_flat, thumbnails
from ca2cl.data.loading.sequential import iterate_tiles
from ca2cl.data.remote.reader import ShardReader, open_index

Pixels = npt.NDArray[np.uint8]
Change = Callable[[Pixels, Pixels], Pixels]
"""A tile and another one, whose stain may be taken, to the changed tile; both (H, W, 3)."""
CPU = torch.device("cpu")
_SHIFT = 8
_TO_LMS = np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
_TO_LAB = np.diag([3**-0.5, 6**-0.5, 2**-0.5]) @ np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]])
_STAINS = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]])
_STRENGTH = np.array([1.9705, 1.0308])
"""Reference stains and their 99th percentiles, of Macenko's own implementation."""


def encoded(form: str, quality: int) -> Change:
    """JPEG or WebP."""

    def change(tile: Pixels, _: Pixels) -> Pixels:
        held = io.BytesIO()
        Image.fromarray(tile).save(held, form, quality=quality)
        return np.asarray(Image.open(held).convert("RGB"))

    return change


def reinhard(tile: Pixels, other: Pixels) -> Pixels:
    """Mean and deviation of the other tile's colours in lαβ (Reinhard et al., IEEE CG&A 2001)."""
    a, b = (np.log10((x.reshape(-1, 3) + 1.0) / 256) @ _TO_LMS.T @ _TO_LAB.T for x in (tile, other))
    lab = (a - a.mean(0)) / (a.std(0) + 1e-6) * b.std(0) + b.mean(0)
    rgb = 10 ** (lab @ np.linalg.inv(_TO_LAB).T) @ np.linalg.inv(_TO_LMS).T
    return _as_pixels(rgb * 256, tile.shape)


def macenko(tile: Pixels, _: Pixels) -> Pixels:
    """Reference stains in place of the tile's own (Macenko et al., ISBI 2009)."""
    density = -np.log((tile.reshape(-1, 3) + 1.0) / 256)
    coloured = density[(density > 0.15).all(1)]
    if len(coloured) < 100:
        return tile
    _, vectors = np.linalg.eigh(np.cov(coloured.T))
    plane = vectors[:, [2, 1]] * np.sign(vectors[:, [2, 1]].sum(0))
    angle = np.arctan2(coloured @ plane[:, 1], coloured @ plane[:, 0])
    stains = np.stack([plane @ (np.cos(at), np.sin(at)) for at in np.percentile(angle, [1, 99])])
    stains = stains if stains[0, 0] > stains[1, 0] else stains[::-1]
    amounts = np.linalg.lstsq(stains.T, density.T, rcond=None)[0]
    amounts *= (_STRENGTH / np.maximum(np.percentile(amounts, 99, axis=1), 1e-3))[:, None]
    return _as_pixels(256 * np.exp(-(_STAINS.T @ amounts).T) - 1, tile.shape)


def _as_pixels(values: npt.NDArray[np.float64], shape: tuple[int, ...]) -> Pixels:
    return values.round().clip(0, 255).astype(np.uint8).reshape(shape)


def shifted(down: int, right: int) -> Change:
    """The part of a tile that lies ``down`` and ``right`` of the part which it is compared with."""
    return lambda tile, _: tile[down : tile.shape[0] - _SHIFT + down, right : tile.shape[1] - _SHIFT + right]


def after(*changes: Change) -> Change:
    """One change after another."""

    def change(tile: Pixels, other: Pixels) -> Pixels:
        for one in changes:
            tile = np.ascontiguousarray(one(tile, other))
        return tile

    return change


CHANGES: dict[str, Change] = {
    "JPEG 95": encoded("JPEG", 95), "JPEG 75": encoded("JPEG", 75), "JPEG 50": encoded("JPEG", 50),
    "WebP 80": encoded("WEBP", 80), "WebP 50": encoded("WEBP", 50),
    "Reinhard": reinhard, "Macenko": macenko,
    "mirrored": lambda tile, _: tile[:, ::-1], "turned by 90°": lambda tile, _: np.rot90(tile),
    "turned by 180°": lambda tile, _: np.rot90(tile, 2),
}  # fmt: skip
SHIFTS: dict[str, Change] = {
    "shifted by (8, 0)": shifted(8, 0), "shifted by (0, 8)": shifted(0, 8), "shifted by (8, 8)": shifted(8, 8),
    "shifted by (4, 4)": shifted(4, 4),
    "Reinhard, shifted by (8, 8), turned, JPEG 60": after(
        reinhard, shifted(8, 8), CHANGES["turned by 90°"], encoded("JPEG", 60)
    ),
    "Macenko, shifted by (8, 8), turned, JPEG 60": after(
        macenko, shifted(8, 8), CHANGES["turned by 90°"], encoded("JPEG", 60)
    ),
}  # fmt: skip
"""Compared with the upper left part of the tile: a real neighbour shows tissue that the tile itself does not have."""


def main() -> None:
    """Print one table, and one line about speed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shards", required=True)
    parser.add_argument("--others", required=True)
    parser.add_argument("--tiles", type=int, default=1000)
    parser.add_argument("--search", type=int, default=0)
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = {"changes": measure(options.shards, options.others, options.tiles)} if options.tiles else {}
    if options.search:
        found["search"] = {"random": time_search(options.shards, options.others, options.search, options.queries)}
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def measure(root: str, others_root: str, most: int) -> dict[str, dict[str, float]]:
    """Recall and false alarms of every change; printed as they are found."""
    tiles = _pixels(root, most)
    others = _thumbnails(others_root)
    whole, part = _small(tiles), _small([tile[:-_SHIFT, :-_SHIFT] for tile in tiles])
    flat = is_flat(whole).numpy()
    _say(f"{len(tiles)} tiles, {flat.sum()} without structure; {len(others)} others")
    unchanged = find_copies(whole, Known(torch.cat([whole, others]), CPU))
    pairs = {(int(q), int(k)) for q, k in zip(unchanged.query_P, unchanged.known_P, strict=True)}
    within = sum(q != k < len(whole) for q, k in pairs) // 2
    between = sum(k >= len(whole) for _, k in pairs)
    _say(f"pairs found without any change: {within} in the set, {between} with others")
    _say(f"by seen.safetensors alone: {_seen(others).has_copies(fingerprints_of(whole)).sum()} tiles")
    table: dict[str, dict[str, float]] = {}
    for group, base in ((CHANGES, whole), (SHIFTS, part)):
        known = Known(torch.cat([base, others]), CPU)
        seen = _seen(base)
        for name, change in group.items():
            stains = [*tiles[1:], tiles[0]]
            changed = _small(
                [np.ascontiguousarray(change(tile, other)) for tile, other in zip(tiles, stains, strict=True)]
            )
            table[name] = _score(find_copies(changed, known), pairs, flat, len(base) + len(others))
            table[name]["recall_of_seen"] = float(seen.has_copies(fingerprints_of(changed))[~flat].mean())
            row = "  ".join(f"{key} {value:.5g}" for key, value in table[name].items())
            _say(f"{name:46s}{row}")
    return table


def _seen(small: Tensor) -> Seen:
    none = np.zeros(0, np.uint64)
    return Seen((SeenShards("", len(small), len(small)),), none, none, fingerprints_of(small))


def _score(found: Copies, unchanged: set[tuple[int, int]], flat: npt.NDArray[np.bool_], known: int) -> dict[str, float]:
    pairs = {(int(q), int(k)) for q, k in zip(found.query_P, found.known_P, strict=True)}
    right = sum(q == k for q, k in pairs)
    wrong = [q for q, k in pairs if q != k and (q, k) not in unchanged]
    asked = int((~flat).sum())
    return {
        "recall": right / asked,
        "false_tiles": len(set(wrong)) / asked,
        "false_pairs": len(wrong) / (asked * known),
    }


def time_search(root: str, others_root: str, known: int, queries: int) -> dict[str, float]:
    """CPU seconds of reading tiles, of the inverted file, and of queries among random thumbnails like the real ones."""
    index = open_index(root, None)
    started = time.process_time()
    tiles = survey(index, ShardReader(root, None, index=index), workers=0, title="read")
    reading = (time.process_time() - started) / len(tiles)
    small = torch.cat([tiles.thumbnails_NSS, _thumbnails(others_root)])
    started = time.process_time()
    many = Known(_random_like(small, known), CPU)
    building = time.process_time() - started
    asked = _random_like(small, queries, seed=1)
    asked[: queries // 2] = many.thumbnails[: queries // 2].flip(2)
    started, wall = time.process_time(), time.monotonic()
    copies = find_copies(asked, many, title="search")
    asking, wall = (time.process_time() - started) / queries, time.monotonic() - wall
    hit = copies.query_P == copies.known_P
    made = {
        "known": known, "cells": len(many.cells_CD), "read_ms_a_tile": 1e3 * reading, "build_s": building,
        "search_ms_a_tile": 1e3 * asking, "search_wall_s": wall, "queries": queries,
        "recall_of_mirrored": int(hit.sum()) / (queries // 2), "false_pairs": int((~hit).sum()),
    }  # fmt: skip
    _say("  ".join(f"{key} {value:.5g}" for key, value in made.items()))
    return made


def _random_like(small_NSS: Tensor, count: int, seed: int = 0) -> Tensor:
    """Random thumbnails uint8 (count, S, S) with the mean spectrum of real ones."""
    amplitude = torch.fft.rfft2(small_NSS[:2000].float() - 128).abs().square().mean(0).sqrt()
    generator = torch.Generator().manual_seed(seed)
    made = torch.empty(count, SIDE, SIDE, dtype=torch.uint8)
    for first in range(0, count, 4096):
        some = made[first : first + 4096]
        field = torch.fft.irfft2(torch.fft.rfft2(torch.randn(len(some), SIDE, SIDE, generator=generator)) * amplitude)
        field = F.layer_norm(field, (SIDE, SIDE))
        some.copy_((field * 32 + 128).round().clamp(0, 255).to(torch.uint8))
    return made


def _pixels(root: str, most: int) -> list[Pixels]:
    index = open_index(root, None)
    reader = ShardReader(root, None, index=index)
    numbers = np.unique(np.linspace(0, len(index) - 1, min(most, len(index))).astype(int))
    batches = iterate_tiles(index, reader, numbers)
    return [tile.copy() for tiles, _, _ in batches for tile in tiles.numpy()]


def _thumbnails(root: str) -> Tensor:
    index = open_index(root, None)
    return survey(index, ShardReader(root, None, index=index), workers=0, title="others").thumbnails_NSS


def _small(tiles: list[Pixels]) -> Tensor:
    return torch.cat([thumbnails(torch.from_numpy(np.ascontiguousarray(tile))[None]) for tile in tiles])


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
