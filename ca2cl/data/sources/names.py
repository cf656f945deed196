"""File names: clutter, slides, names that are not UTF-8."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

_CLUTTER = frozenset(
    {
        "__macosx", "icon\r", "network trash folder", "temporary items",  # macOS, in archives and on shares
        "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "recycler", "system volume information",  # Windows
        "@eadir", "@tmp", "#recycle", "#snapshot",  # Synology; @eaDir holds a thumbnail of every image
        "@recycle", "@recently-snapshot", "@transcode",  # QNAP
        "~snapshot", "lost+found", "__pycache__",  # NetApp, ext4, Python
    }
)  # fmt: skip

SLIDES = frozenset({"svs", "ndpi", "mrxs", "scn", "bif", "vms", "vmu", "svslide", "czi", "dcm"})
"""Endings of whole-slide images that are never those of tiles."""


def slides_instead(source: Path) -> str:
    """The remedy where tiles are asked for and there are slides: a file, a pattern, or some below a folder."""
    names = (name for _, _, files in os.walk(source) for name in files) if source.is_dir() else [source.name]
    found = min({suffix for name in names if (suffix := Path(name).suffix.lower())[1:] in SLIDES}, default=None)
    if found is None:
        return ""
    what = f"has {found} files" if source.is_dir() else "slides, not tiles"
    return f"{what}: add --mpp 0.5 (micrometres a pixel) to cut tiles from slides"


def is_clutter(name: str) -> bool:
    """True for names of files and folders that a system keeps for itself: hidden ones (``.DS_Store``, ``._a.png``,
    ``.ipynb_checkpoints``, ``.snapshot``), thumbnails, recycle bins. All code that lists folders of images skips them.
    """
    return name.startswith(".") or name.lower() in _CLUTTER


def as_text(name: str) -> str | None:
    """A file's name as text in its composed form (NFC), as everything that writes it down needs it; None where its
    bytes are not UTF-8.

    In a locale that is not UTF-8 Python reads every name with an umlaut as bytes that are no text; macOS takes umlauts
    apart (NFD), so that a class would have two names, one on each system.
    """
    try:
        return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8"))
    except UnicodeError:
        return None


def shown(name: str) -> str:
    """A file's name as text, with a mark for every byte that is none."""
    return os.fsencode(name).decode("utf-8", "replace")
