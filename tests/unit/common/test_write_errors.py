"""A full disk is one line whose remedy is true for the verb that met it."""

from __future__ import annotations

import inspect
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ca2cl.cli import main
from ca2cl.common import files as atomic
from ca2cl.common.job_dir import JobDir, job_record
from ca2cl.detection.engines.checkpoint import DetectorCard, write_detector
from ca2cl.errors import InputError
from ca2cl.evaluation.report import write_json
from ca2cl.reproduce.run import job_dir
from ca2cl.tracking.journal import Journal
from tests.support.glands import write_pairs


@contextmanager
def full_disk(room: int = 64) -> Iterator[None]:
    """The kernel refuses every byte of a file past ``room``, as it would on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def detector(folder: Path) -> None:
    card = DetectorCard(
        head="mask_rcnn_fpn", arch="resnet18", classes=("gland",), mean=(0.0,) * 3, std=(1.0,) * 3, test_side=64,
        longest_side=64, norm="frozen", engine="torchvision", engine_version="0",
    )  # fmt: skip
    write_detector(folder / "detector", card, {"w": torch.zeros(100)})


def journal(folder: Path) -> None:
    Journal(folder / "journal.jsonl").append({"event": "x" * 100})


WRITERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "detect": (detector, "finished detectors and the last checkpoint are kept"),
    "detect's folder": (
        lambda folder: JobDir(folder, "detect.json").write(job_record({"a": "b" * 100})),
        "a folder you can write",
    ),
    "reproduce": (lambda folder: job_dir(folder).write(job_record({"a": "b" * 100})), "a folder you can write"),
    "probe": (lambda folder: write_json(folder / "probe.json", {"a": "b" * 100}), "a file in a folder you can write"),
    "any run": (journal, "free some space and start again"),
}


@pytest.mark.parametrize("verb", WRITERS)
def test_a_full_disk_names_the_remedy_of_its_own_verb(verb: str, tmp_path: Path) -> None:
    write, remedy = WRITERS[verb]
    with full_disk(), pytest.raises(InputError) as refused:
        write(tmp_path)
    message = str(refused.value)
    assert "File too large" in message and remedy in message and str(tmp_path) in message
    assert "shards" not in message
    assert not list(tmp_path.rglob("*tmp*"))


def test_prepared_data_that_do_not_fit_leave_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pairs, out = write_pairs(tmp_path / "in", [f"image-{number}" for number in range(20)]), tmp_path / "out"
    with full_disk(max(path.stat().st_size for path in pairs.rglob("*.png")) + 1):  # room for each image, not for JSON
        code = main(["detect", "prepare", "masks", str(pairs), str(out), "--min_area", "0"])
    error = capfd.readouterr().err.splitlines()[-1]
    assert code == 2 and "cannot be written (File too large)" in error and error.endswith("nothing was kept"), error
    assert not out.exists()


def test_every_caller_must_give_its_own_remedy() -> None:
    for function in (atomic.writing, atomic.write_atomic, atomic.sync_replace, atomic.remove_temporaries):
        assert inspect.signature(function).parameters["remedy"].default is inspect.Parameter.empty, function
