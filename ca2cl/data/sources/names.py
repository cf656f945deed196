"""File names: system clutter, and names that are not UTF-8."""

from __future__ import annotations

import os
import unicodedata

_CLUTTER = frozenset(
    {
        "__macosx", "icon\r", "network trash folder", "temporary items",  # macOS, in archives and on shares
        "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "recycler", "system volume information",  # Windows
        "@eadir", "@tmp", "#recycle", "#snapshot",  # Synology; @eaDir holds a thumbnail of every image
        "@recycle", "@recently-snapshot", "@transcode",  # QNAP
        "~snapshot", "lost+found", "__pycache__",  # NetApp, ext4, Python
    }
)  # fmt: skip


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
