"""Writes small shard folders for tests: tars by tarfile, index and manifest by ca2cl.data.shards.index."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ca2cl.data.shards.index import (
    INDEX_NAME,
    MANIFEST_NAME,
    SCHEMA_VERSION,
    Manifest,
    digest_of,
    write_index,
)
from ca2cl.data.shards.samples import ShardInfo, ShardSamples


def encode(pixels_HWC: npt.NDArray[np.uint8], kind: str = "PNG", **options: object) -> bytes:
    """One image as encoded bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, kind, **options)
    return buffer.getvalue()


def random_tiles(count: int, side: int = 16, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Noise tiles, shape (count, side, side, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def write_shards(
    root: Path,
    encoded: Sequence[bytes],
    labels: Sequence[int] | None = None,
    *,
    per_shard: int = 10,
    ext: str = "png",
    classes: Sequence[str] = ("a", "b", "c"),
    tile_size: tuple[int, int] = (16, 16),
    abouts: Sequence[object] = (),
    groups: Sequence[str | None] = (),
) -> Path:
    """Write ``encoded`` tiles as a shard folder; sample i has key ``t%06d`` and label i % classes unless given, and
    ``abouts[i]`` as its ``.json`` and ``groups[i]`` as its slide if there are any."""
    root.mkdir(parents=True, exist_ok=True)
    labels = [i % len(classes) for i in range(len(encoded))] if labels is None else list(labels)
    parts = []
    for number, first in enumerate(range(0, len(encoded), per_shard)):
        rows = range(first, min(first + per_shard, len(encoded)))
        info, samples = _write_shard(root / f"shard-{number:06d}.tar", encoded, labels, rows, ext, abouts)
        parts.append((info, replace(samples, group=[groups[i] for i in rows]) if groups else samples))
    infos = [info for info, _ in parts]
    write_index(root / INDEX_NAME, parts)
    counts = Counter(classes[label] for label in labels if label >= 0)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        classes=list(classes),
        counts={name: counts[name] for name in classes},
        tile_size=list(tile_size),
        source="test",
        encode="keep",
        samples=len(encoded),
        shards=len(infos),
        bytes=sum(info.bytes for info in infos),
        digest=digest_of(classes, tile_size, infos),
    )
    (root / MANIFEST_NAME).write_text(json.dumps(asdict(manifest)))
    return root


def _write_shard(
    path: Path, encoded: Sequence[bytes], labels: Sequence[int], rows: range, ext: str, abouts: Sequence[object]
) -> tuple[ShardInfo, ShardSamples]:
    keys = [f"t{i:06d}" for i in rows]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, key in zip(rows, keys, strict=True):
            member = tarfile.TarInfo(f"{key}.{ext}")
            member.size = len(encoded[i])
            tar.addfile(member, io.BytesIO(encoded[i]))
            if abouts:
                about = json.dumps(abouts[i]).encode()
                member = tarfile.TarInfo(f"{key}.json")
                member.size = len(about)
                tar.addfile(member, io.BytesIO(about))
    with tarfile.open(path) as tar:
        members = [member for member in tar.getmembers() if member.name.endswith(f".{ext}")]
    samples = ShardSamples(
        key=keys,
        ext=[ext] * len(keys),
        offset=np.array([m.offset_data for m in members], np.int64),
        size=np.array([m.size for m in members], np.int64),
        label=np.array([labels[i] for i in rows], np.int32),
        group=[None] * len(keys),
    )
    data = path.read_bytes()
    return ShardInfo(path.name, len(data), hashlib.sha256(data).hexdigest(), len(keys)), samples
