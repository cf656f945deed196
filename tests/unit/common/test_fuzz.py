"""Readers of files from elsewhere: whatever is in them, an InputError or a result, at once and in little memory."""

from __future__ import annotations

import json
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from ca2cl.data.shards.index import INDEX_NAME, ShardIndex
from ca2cl.detection.coco.files import encode_mask
from ca2cl.detection.coco.segmentations import fault_of_segmentation
from ca2cl.errors import InputError
from ca2cl.tracking.journal import training_lines
from tests.support.mutants import DEEP, damaged_bytes, damaged_json
from tests.support.readers import LINES, Reader, make_readers, put, write_journal

ORDINARY, LONG = 120, 6250
"""Inputs of a reader at one level; there are 8 readers and two levels."""
_CPU_SECONDS, _MEGABYTES = 2.0, 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def readers(folder: Path) -> dict[str, Reader]:
    return make_readers(folder)


READERS = ("manifest", "index", "encoder card", "detector card", "journal", "run", "coco", "checkpoint")


@contextmanager
def _in_bounds() -> Iterator[None]:
    """No hang, by processor time, so that a busy machine does not count; and no memory that stays or was touched."""

    def stop(*_: object) -> None:
        raise AssertionError("a reader hangs")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, 20)
    peak, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    assert time.process_time() - started < _CPU_SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < _MEGABYTES * 1024


def look(reader: Reader, folder: Path) -> bool:
    """Read the file and say whether it passed. Anything but an InputError in one line is a fault."""
    path = folder / reader.name
    with _in_bounds():
        try:
            reader.read(path)
        except InputError as error:
            told = str(error)
            assert "\n" not in told and len(told) < 2000 + len(str(path)), told[:3000]
            return False
    return True


def fuzz(reader: Reader, folder: Path, level: str, examples: int) -> int:
    """Read so many damaged files; returns how many were refused."""
    refused = 0
    reader.write(folder / reader.name, reader.valid)
    assert look(reader, folder)
    good = (folder / reader.name).read_bytes()
    strategy = damaged_bytes(good) if level == "bytes" else damaged_json(reader.valid)
    phases = (Phase.generate, Phase.shrink)

    @settings(
        max_examples=examples, deadline=None, database=None, phases=phases, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def one(damaged: Any) -> None:
        nonlocal refused
        if level == "bytes":
            put(folder / reader.name, damaged)
        else:
            reader.write(folder / reader.name, damaged)
        refused += not look(reader, folder)

    one()
    return refused


@pytest.mark.parametrize("level", ["bytes", "structure"])
@pytest.mark.parametrize("name", READERS)
def test_no_file_breaks_its_reader(name: str, level: str, readers: dict[str, Reader], folder: Path) -> None:
    refused = fuzz(readers[name], folder, level, ORDINARY)
    assert name == "journal" or refused > ORDINARY // 10  # a journal's damaged lines are passed over


def _set(value: Any, *path: Any) -> Callable[[Any], None]:
    """Put ``value`` at a place of nested JSON."""

    def change(holder: Any) -> None:
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = value

    return change


MANY = 10**12
FIELDS = {
    "manifest": "source", "index": "shards", "encoder card": "metrics", "detector card": "classes", "run": "params",
    "coco": "info", "checkpoint": "best",
}  # fmt: skip
DECLARED = [
    ("manifest", _set([MANY, MANY], "tile_size")),
    ("manifest", _set([10**5, 10**5], "tile_size")),
    ("manifest", _set(10**30, "samples")),
    ("index", _set(MANY, "shards", 0, "samples")),
    ("index", _set(2**63, "shards", 0, "bytes")),
    ("encoder card", _set(MANY, "input_size")),
    ("encoder card", _set(MANY, "feature_dim")),
    ("encoder card", _set([0.5, 0.5, float("nan")], "mean")),
    ("detector card", _set(MANY, "test_side")),
    ("detector card", _set([str(number) for number in range(20_000)], "classes")),
    ("run", _set("../" * 9, "run_id")),
    ("coco", _set(10**6, "images", 0, "height")),
    ("coco", _set([10**6, 10**6], "annotations", 0, "segmentation", "size")),
    ("coco", _set([MANY], "annotations", 1, "segmentation", "counts")),
    ("coco", _set([600, 600], "annotations", 1, "segmentation", "counts")),
    ("coco", _set("oooooooooooo0", "annotations", 0, "segmentation", "counts")),
    ("coco", _set("P" * 50, "annotations", 0, "segmentation", "counts")),
    ("coco", _set([0, 0, 1e12, 0, 0, 1e12], "annotations", 2, "segmentation", 0)),
    ("coco", _set([0, 0, float("nan"), 0, 0, 1], "annotations", 2, "segmentation", 0)),
    ("coco", _set([0, 0, 49, 49] * 20_000, "annotations", 2, "segmentation", 0)),
    ("checkpoint", _set(10**30, "step")),
    ("checkpoint", _set("2", "progress", "step")),
    ("checkpoint", _set(-1, "progress", "a method's count")),
    *((name, _set(DEEP, key)) for name, key in FIELDS.items()),
]


@pytest.mark.parametrize("case", range(len(DECLARED)))
def test_what_a_file_declares_is_not_believed(case: int, readers: dict[str, Reader], folder: Path) -> None:
    """Sizes that would be allocated, runs that leave their image, names that become paths."""
    name, change = DECLARED[case]
    damaged = json.loads(json.dumps(readers[name].valid))
    change(damaged)
    readers[name].write(folder / readers[name].name, damaged)
    assert not look(readers[name], folder)


def test_rows_that_the_index_cannot_hold_are_refused_on_opening_it(readers: dict[str, Reader], folder: Path) -> None:
    """Before any is read: orders of samples are made from the count alone."""
    content = json.loads(json.dumps(readers["index"].valid))
    content["shards"][0]["samples"] = MANY
    readers["index"].write(folder / INDEX_NAME, content)
    with _in_bounds(), pytest.raises(InputError, match=f"{MANY + 2} samples in"):
        ShardIndex(folder)


def test_a_line_that_is_nested_without_end_is_passed_over(tmp_path: Path) -> None:
    write_journal(tmp_path / "journal.jsonl", [LINES[1], {"step": 5, "x": DEEP}, LINES[2]])
    assert [line["step"] for line in training_lines(tmp_path / "journal.jsonl")] == [1, 2]


def test_run_lengths_are_decoded_as_pycocotools_does(folder: Path) -> None:
    """Our own decoder, which only checks, against the masks of the library, of all shapes of runs."""
    from pycocotools import mask as tools

    random = np.random.default_rng(0)
    for number in range(200):
        mask_HW = random.random((random.integers(1, 60), random.integers(1, 60))) < random.choice([0, 0.02, 0.5, 1])
        code = encode_mask(np.repeat(mask_HW, random.integers(1, 40), axis=0) if number % 2 else mask_HW)
        assert fault_of_segmentation(code, *code["size"]) == ""
        assert tools.decode(code).shape == tuple(code["size"])


@pytest.mark.slow
@pytest.mark.parametrize("level", ["bytes", "structure"])
@pytest.mark.parametrize("name", READERS)
def test_no_file_of_many_breaks_its_reader(name: str, level: str, readers: dict[str, Reader], folder: Path) -> None:
    assert set(readers) == set(READERS) and 2 * len(READERS) * LONG >= 10**5
    fuzz(readers[name], folder, level, LONG)
