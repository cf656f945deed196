"""Find patients and images that a test split shares with train."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from ca2cl.detection.coco.files import read_coco
from ca2cl.detection.engines.base import CocoSplit
from ca2cl.evaluation.leakage import Leak, Side, find_leak


def find_shared(train: CocoSplit, tests: Mapping[str, CocoSplit]) -> dict[str, Leak]:
    """What each test split shares with train. Warns if anything; patients are compared where both files name them.

    Raises:
        InputError: a file is damaged.
    """
    side = _side(train)
    return {name: find_leak(side, _side(split), name=name, what="images") for name, split in tests.items()}


def _side(split: CocoSplit) -> Side:
    images = read_coco(split.annotations)["images"]
    paths = [split.images / image["file_name"] for image in images]
    return Side(
        digest=hashlib.sha256(split.annotations.read_bytes()).hexdigest(),
        keys=(),  # a number that begins anew in every split tells nothing
        samples=[image["id"] for image in images],
        groups=[str(image["patient_id"]) if "patient_id" in image else None for image in images],
        pixels=[_digest(path) for path in paths],
    )


def _digest(path: Path) -> bytes:
    """Of the file, or of its name where an image that nothing is annotated in is not there."""
    content = path.read_bytes() if path.is_file() else str(path).encode()
    return hashlib.blake2b(content, digest_size=16).digest()
