"""The index and manifest come back as written, and damage never passes for data."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ca2cl.data.shards.index import (
    INDEX_NAME,
    MANIFEST_NAME,
    Manifest,
    ShardIndex,
    digest_of,
    key_hash,
    write_index,
)
from ca2cl.data.shards.samples import ShardInfo, ShardSamples
from ca2cl.errors import InputError

Part = tuple[ShardInfo, ShardSamples]
UNCHECKED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
ROW = st.tuples(TEXT, st.sampled_from(["jpg", "tif"]), st.integers(-1, 2), st.none() | TEXT)


def part(number: int, rows: list[tuple[str, str, int, str | None]]) -> Part:
    """A shard of one block a tile."""
    samples = ShardSamples(
        key=[row[0] for row in rows],
        ext=[row[1] for row in rows],
        offset=np.arange(len(rows), dtype=np.int64) * 1024 + 512,
        size=np.full(len(rows), 512, np.int64),
        label=np.array([row[2] for row in rows], np.int32),
        group=[row[3] for row in rows],
    )
    return ShardInfo(f"shard-{number:06d}.tar", len(rows) * 1024, "0" * 64, len(rows)), samples


def write(root: Path, parts: list[Part], classes: Sequence[str] = ("ADI", "LYM", "TUM")) -> None:
    root.mkdir(exist_ok=True, parents=True)
    infos = [info for info, _ in parts]
    total = sum(info.samples for info in infos)
    manifest = Manifest(
        schema_version=1, classes=list(classes), counts={}, tile_size=[8, 8], source="s", encode="keep", samples=total,
        shards=len(infos), bytes=sum(info.bytes for info in infos), digest=digest_of(classes, [8, 8], infos),
    )  # fmt: skip
    write_index(root / INDEX_NAME, parts)
    (root / MANIFEST_NAME).write_text(json.dumps(asdict(manifest)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    parts = [part(n, [(f"k{n}-{row}", "jpg", row % 3, f"g{row}") for row in range(3 + n)]) for n in range(3)]
    write(tmp_path / "shards", parts)
    return tmp_path / "shards"


def read_all(root: Path) -> None:
    index = ShardIndex(root)
    for samples in index:
        list(samples.key), list(samples.ext), list(samples.group)
    index.labels()


@given(st.lists(st.lists(ROW, max_size=5), max_size=4))
@settings(deadline=None, max_examples=60, suppress_health_check=UNCHECKED)
def test_an_index_comes_back_as_written(tmp_path: Path, shards: list[list[Any]]) -> None:
    parts = [part(number, rows) for number, rows in enumerate(shards)]
    write(tmp_path, parts)
    index = ShardIndex(tmp_path)
    assert index.shards == [info for info, _ in parts]
    assert len(index) == sum(len(rows) for rows in shards)
    for found, (_, samples) in zip(index, parts, strict=True):
        assert list(found.key) == samples.key and list(found.ext) == samples.ext
        assert list(found.group) == samples.group
        for name in ("offset", "size", "label"):
            assert np.array_equal(getattr(found, name), getattr(samples, name))
    rows = [(number, row) for number, content in enumerate(shards) for row in range(len(content))]
    assert [index.locate(sample) for sample in range(len(index))] == rows
    assert index.labels().tolist() == [row[2] for content in shards for row in content]


@given(st.data())
@settings(deadline=None, max_examples=300, suppress_health_check=UNCHECKED)
@pytest.mark.parametrize("name", [INDEX_NAME, MANIFEST_NAME])
def test_damaged_bytes_are_an_input_error_or_change_nothing(folder: Path, name: str, data: st.DataObject) -> None:
    path = folder / name
    original = path.read_bytes()
    position = data.draw(st.integers(0, len(original) - 1))
    damage = data.draw(st.binary(min_size=1, max_size=8))
    try:
        path.unlink()  # the old file may still be mapped
        path.write_bytes(original[:position] + damage + original[position + len(damage) :])
        try:
            read_all(folder)
        except InputError as error:
            assert str(folder) in str(error) and "\n" not in str(error)
    finally:
        path.unlink()
        path.write_bytes(original)


@given(length=st.integers(0, 3000))
@settings(deadline=None, max_examples=60, suppress_health_check=UNCHECKED)
@pytest.mark.parametrize("name", [INDEX_NAME, MANIFEST_NAME])
def test_truncated_files_are_an_input_error(folder: Path, name: str, length: int) -> None:
    path = folder / name
    original = path.read_bytes()
    try:
        path.unlink()
        path.write_bytes(original[: min(length, len(original) - 1)])
        with pytest.raises(InputError, match=name):
            read_all(folder)
    finally:
        path.unlink()
        path.write_bytes(original)


@pytest.mark.parametrize("name", [INDEX_NAME, MANIFEST_NAME])
def test_missing_files_are_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"{name}: no "):
        ShardIndex(folder)


def test_a_newer_schema_asks_for_an_upgrade(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest | {"schema_version": 99}))
    with pytest.raises(InputError, match="schema 99 is newer.*upgrade"):
        ShardIndex(folder)


@pytest.mark.parametrize("name", ["../evil.tar", "/etc/passwd", "a/b.tar", ".."])
def test_names_that_leave_the_folder_are_refused(folder: Path, name: str) -> None:
    info, samples = part(0, [("k", "jpg", 0, None)])
    write(folder, [(ShardInfo(name, info.bytes, info.sha256, info.samples), samples)])
    with pytest.raises(InputError, match="is no tar in this folder"):
        ShardIndex(folder)


def test_an_index_of_other_shards_is_refused(folder: Path) -> None:
    manifest = (folder / MANIFEST_NAME).read_text()
    write(folder, [part(0, [("k", "jpg", 0, None)])])
    (folder / MANIFEST_NAME).write_text(manifest)
    with pytest.raises(InputError, match="does not match manifest"):
        ShardIndex(folder)


def test_verify_finds_missing_truncated_and_changed_tars(folder: Path) -> None:
    index = ShardIndex(folder)
    with pytest.raises(InputError, match=r"shard-000000\.tar: shard missing"):
        index.verify()
    for info in index.shards:
        (folder / info.name).write_bytes(bytes(info.bytes))
    index.verify()
    with pytest.raises(InputError, match="does not match its index"):
        index.verify(1)
    (folder / "shard-000002.tar").write_bytes(b"")
    with pytest.raises(InputError, match=r"shard-000002\.tar: truncated tar, 0 bytes instead of 5120"):
        ShardIndex(folder)


@pytest.mark.parametrize(
    "row",
    [{"offset": -1}, {"offset": 10_000}, {"size": -5}, {"size": 10_000}, {"label": 7}, {"label": -2}],
)
def test_rows_outside_their_tar_or_classes_are_refused(folder: Path, row: dict[str, int]) -> None:
    info, samples = part(0, [("k", "jpg", 0, None)])
    for name, value in row.items():
        getattr(samples, name)[0] = value
    write(folder, [(info, samples)])
    with pytest.raises(InputError, match="damaged index"):
        read_all(folder)


def test_a_label_without_classes_is_refused(folder: Path) -> None:
    write(folder, [part(0, [("k", "jpg", 0, None)])], classes=[])
    with pytest.raises(InputError, match="a label has no class"):
        read_all(folder)


def test_an_index_survives_pickling(folder: Path) -> None:
    index = ShardIndex(folder)
    copy = pickle.loads(pickle.dumps(index))  # noqa: S301  # our own bytes; what a spawned worker does
    assert copy.shards == index.shards and list(copy.samples(1).key) == list(index.samples(1).key)


def test_key_hash_is_stable_and_signed() -> None:
    assert key_hash("TUM~a") == key_hash("TUM~a") != key_hash("TUM~b")
    hashes = [key_hash(str(number)) for number in range(1000)]
    assert len(set(hashes)) == 1000 and min(hashes) < 0 < max(hashes)
    assert all(-(2**63) <= value < 2**63 for value in hashes)
    assert key_hash("ADI~x") == -1818237330329614606
