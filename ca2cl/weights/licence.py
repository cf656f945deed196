"""Licence of weights, as far as their source states one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE")
"""Names under which a repository or a folder has the text."""
MODEL_CARD = "README.md"
_LONGEST = 200_000
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
Get = Callable[[str], Path | None]
"""A file of the source by its name; None where it has none."""


class Licence(NamedTuple):
    """Name by the source's own words, with a link where it has one; and the text. None where it states none."""

    name: str | None = None
    text: str | None = None


def stated(get: Get, settings: str | None = None) -> Licence:
    """The licence by a hub repository's model card (``license``, ``license_name``, ``license_link``), by its timm
    configuration, and by the file of its text.

    Args:
        get: reads the repository.
        settings: ``license`` of the timm configuration.
    """
    fields = _front_matter(get(MODEL_CARD))
    name = _word(fields.get("license_name")) or _word(fields.get("license")) or settings
    link = _word(fields.get("license_link"))
    files = [link] if link and "://" not in link else []
    text = next((text for file in [*files, *FILES] if (text := _text(get(file))) is not None), None)
    shown = f"{name or 'see'} ({link})" if link and "://" in link else name
    return Licence(shown or (_first_line(text) if text else None), text)


def beside(path: Path) -> Licence:
    """The licence by a file that lies beside weights on the disk; its first line is the name."""
    text = next((text for name in FILES if (text := _text(path.parent / name)) is not None), None)
    return Licence(_first_line(text), text) if text else Licence()


def _front_matter(path: Path | None) -> dict[str, Any]:
    text = _text(path)
    match = _FRONT_MATTER.match(text.replace("\r\n", "\n")) if text else None
    try:
        fields = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _word(value: Any) -> str | None:
    if isinstance(value, list):
        value = ", ".join(str(one) for one in value)
    return " ".join(value.split())[:300] if isinstance(value, str) and value.strip() else None


def _text(path: Path | None) -> str | None:
    if path is None or not path.is_file():
        return None
    try:
        return path.read_bytes()[:_LONGEST].decode("utf-8", "replace").strip() or None
    except OSError:
        return None


def _first_line(text: str) -> str:
    return next(line.strip(" #*\t") for line in text.splitlines() if line.strip())[:200]
