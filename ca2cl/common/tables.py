"""Print plain tables with aligned columns."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from datetime import datetime, timezone


def aligned(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The rows as text, every column as wide as its widest cell."""
    cells = [list(heads), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines) + "\n"


def fitted(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """``aligned``, or, on a terminal that is too narrow for it, a block of lines for each row."""
    table = aligned(heads, rows)
    if not sys.stdout.isatty() or max(map(len, table.splitlines())) <= shutil.get_terminal_size().columns:
        return table
    width = max(map(len, heads))
    blocks = ["".join(f"{head:{width}}  {cell}\n" for head, cell in zip(heads, row, strict=True)) for row in rows]
    return "\n".join(blocks)


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


def duration(seconds: float) -> str:
    """In the two largest units: 2.4 s, 3 min 20 s, 5 h 12 min, 3 d 4 h."""
    if seconds < 100:
        return f"{seconds:.2g} s"
    for long, short, unit, part in (("min", "s", 60, 1), ("h", "min", 3600, 60), ("d", "h", 86400, 3600)):
        if seconds < 100 * unit or long == "d":
            whole, rest = divmod(round(seconds / part), unit // part)
            return f"{whole} {long} {rest} {short}" if rest else f"{whole} {long}"
    raise AssertionError(seconds)
