"""COCO files of instances: reading, validation, masks and average precision."""

from typing import Any

_HERE_BEFORE = ("encode_mask", "read_coco")
"""Names that programs import from here; they are looked up when they are, since the settings of ``detect prepare``
lie in this package and ``files`` imports SciPy."""


def __getattr__(name: str) -> Any:
    if name not in _HERE_BEFORE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ca2cl.detection.coco import files

    return getattr(files, name)
