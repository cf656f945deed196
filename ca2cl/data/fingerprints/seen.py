"""``seen.safetensors``: digests and fingerprints of an encoder's training tiles.

It lies beside ``card.json``, so that a test set can be compared with the training data of an encoder when its shards
are elsewhere. It holds all slides and a sample of the tiles, and no names and no pixels.

Legend: G slides or patients, P pixel digests, N fingerprints, D their length.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from annotated_types import Ge
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ca2cl.common.files import write_atomic
from ca2cl.common.records import Count, parse_record
from ca2cl.data.fingerprints.thumbnails import FINE, ORIENTATIONS, descriptors, oriented
from ca2cl.errors import InputError

SEEN_NAME = "seen.safetensors"
SCHEMA_VERSION = 1
COPY = 0.87
"""Least cosine of the fine descriptors of copies."""
_KEY = "ca2cl"
_AGAIN = "remove it: the encoder is then compared by its manifests alone"
_SCALE = 127.0
Words = npt.NDArray[np.uint64]
Fingerprints = npt.NDArray[np.int8]


@dataclass(frozen=True)
class SeenShards:
    """A set of shards that tiles were seen of."""

    digest: str
    """Of its manifest."""
    tiles: Count
    read: Count
    """Tiles that digests and fingerprints were made of."""


@dataclass(frozen=True)
class _About:
    """Metadata of the file."""

    schema_version: Annotated[int, Ge(1)]
    shards: list[SeenShards]


@dataclass(frozen=True)
class Seen:
    """Tiles that an encoder, or the weights that it began with, was trained on.

    Attributes:
        shards: sets of shards that are covered.
        groups_G: digests of the names of slides or patients, sorted.
        pixels_P: digests of the pixels of tiles, sorted.
        fingerprints_ND: int8, of the same tiles.
    """

    shards: tuple[SeenShards, ...]
    groups_G: Words
    pixels_P: Words
    fingerprints_ND: Fingerprints

    @property
    def manifests(self) -> tuple[str, ...]:
        """Digests of the manifests that are covered."""
        return tuple(one.digest for one in self.shards)

    def has_groups(self, names: Iterable[str | None]) -> npt.NDArray[np.bool_]:
        """True for each name of a slide or patient that is among them; a tile without a name has none."""
        listed = list(names)
        known = {name: group_word(name) for name in set(listed) if name is not None}
        words = np.array([known.get(name, 0) if name is not None else 0 for name in listed], np.uint64)
        shared: npt.NDArray[np.bool_] = np.isin(words, self.groups_G)
        shared &= np.array([name is not None for name in listed], bool)
        return shared

    def has_pixels(self, digests: Sequence[bytes]) -> npt.NDArray[np.bool_]:
        """True for each tile whose pixels are among them, by its digest of 8 bytes or more."""
        words = np.array([pixel_word(digest) for digest in digests], np.uint64)
        return np.isin(words, self.pixels_P)

    def has_copies(self, fingerprints_BD: Fingerprints, device: torch.device | None = None) -> npt.NDArray[np.bool_]:
        """True for each tile that is a copy of one of them: re-encoded, other stain, flipped or turned."""
        found = np.zeros(len(fingerprints_BD), bool)
        if not len(self.fingerprints_ND):
            return found
        device = device or torch.device("cpu")
        known = torch.from_numpy(self.fingerprints_ND)
        for first in range(0, len(fingerprints_BD), 512):
            vectors = torch.from_numpy(fingerprints_BD[first : first + 512]).to(device).float() / _SCALE
            views = torch.cat([oriented(vectors, FINE, orientation) for orientation in range(ORIENTATIONS)])
            best = torch.full((len(views),), -1.0, device=device)
            for part in torch.split(known, 4096):
                best = torch.maximum(best, (views @ (part.to(device).float() / _SCALE).T).amax(1))
            found[first : first + 512] = (best.view(ORIENTATIONS, -1).amax(0) >= COPY).cpu().numpy()
        return found


def group_word(name: str) -> int:
    """64 bits of a slide's or patient's name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8, person=b"ca2cl.group").digest(), "little")


def pixel_word(digest: bytes) -> int:
    """The first 64 bits of a tile's pixel digest."""
    return int.from_bytes(digest[:8], "little")


def fingerprints_of(thumbnails_BSS: torch.Tensor) -> Fingerprints:
    """Fine descriptors int8 (B, D) of thumbnails; zero for flat tiles."""
    vectors = descriptors(thumbnails_BSS, FINE) * _SCALE
    fingerprints: Fingerprints = vectors.round().to(torch.int8).cpu().numpy()
    return fingerprints


def merged(parts: Iterable[Seen | None]) -> Seen | None:
    """All that was seen in any of them; a set of shards counts once. None for none."""
    kept: list[Seen] = []
    for part in parts:
        known = {digest for one in kept for digest in one.manifests}
        if part is not None and not set(part.manifests) <= known:
            kept.append(part)
    if not kept:
        return None
    return Seen(
        tuple({one.digest: one for part in kept for one in part.shards}.values()),
        np.unique(np.concatenate([part.groups_G for part in kept])),
        np.unique(np.concatenate([part.pixels_P for part in kept])),
        np.concatenate([part.fingerprints_ND for part in kept]),
    )


def write_seen(folder: Path, seen: Seen | None) -> None:
    """Write the file into an encoder's folder; None removes one that an earlier encoder left there.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / SEEN_NAME
    if seen is None:
        path.unlink(missing_ok=True)
        return
    about = json.dumps(asdict(_About(SCHEMA_VERSION, list(seen.shards))))
    tensors: dict[str, npt.NDArray[Any]] = {
        "groups": seen.groups_G,
        "pixels": seen.pixels_P,
        "fingerprints": seen.fingerprints_ND,
    }
    write_atomic(path, save(tensors, {_KEY: about}), "free some space")


def read_seen(folder: Path) -> Seen | None:
    """What ``write_seen`` wrote into an encoder's folder; None where there is no such file.

    Raises:
        InputError: it is damaged, or of a newer schema.
    """
    path = folder / SEEN_NAME
    if not path.exists():
        return None
    try:
        with safe_open(path, "np") as file:
            metadata = (file.metadata() or {})[_KEY]
            tensors: dict[str, Any] = {name: file.get_tensor(name) for name in ("groups", "pixels", "fingerprints")}
        about = parse_record(metadata, _About, path, _AGAIN)
        if about.schema_version > SCHEMA_VERSION:
            raise InputError(f"{path}: schema {about.schema_version} of a newer ca2cl; update ca2cl")
        seen = Seen(tuple(about.shards), tensors["groups"], tensors["pixels"], tensors["fingerprints"])
        _check(seen)
    except InputError:
        raise
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path}: damaged ({' '.join(str(error).split())[:200]}); {_AGAIN}") from None
    return seen


def _check(seen: Seen) -> None:
    for name, words in (("groups", seen.groups_G), ("pixels", seen.pixels_P)):
        if words.dtype != np.uint64 or words.ndim != 1:
            raise ValueError(f"{name} are {words.dtype} {words.shape}")
    prints = seen.fingerprints_ND
    if prints.dtype != np.int8 or prints.ndim != 2 or prints.shape[1] != FINE.length:
        raise ValueError(f"fingerprints are {prints.dtype} {prints.shape}")
