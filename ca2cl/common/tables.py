"""Print plain tables with aligned columns."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone


def aligned(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The rows as text, every column as wide as its widest cell."""
    cells = [list(heads), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines) + "\n"


def short(digest: str | None) -> str:
    """The first eight digits of a digest or id: enough to tell them apart by eye."""
    return digest[:8] if digest else "-"


def when(milliseconds: int | None) -> str:
    """MLflow's milliseconds as the UTC minute."""
    if not milliseconds:
        return "-"
    return datetime.fromtimestamp(milliseconds / 1000, timezone.utc).strftime("%Y-%m-%d %H:%M")


def iso(milliseconds: int | None) -> str | None:
    """MLflow's milliseconds as ISO 8601 in UTC, for programs."""
    if not milliseconds:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, timezone.utc).isoformat(timespec="seconds")
