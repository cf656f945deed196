"""Medical centre or scanner of every tile."""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from ca2cl.data.shards.index import ShardIndex
from ca2cl.errors import InputError
from ca2cl.slides.records import SLIDES_NAME, read_rows

logger = logging.getLogger(__name__)

SET = "set"
"""Setting by which every test set is a centre of its own."""
GROUP = "group"
SLIDE_COLUMNS = ("vendor", "mpp")
_CENTER = "center"
_AT = re.compile(r"_x\d+_y\d+$")
Assign = Callable[[int], str | None]
"""Sample number in index order → its centre, or None."""


@dataclass(frozen=True)
class TileSet:
    """Labelled tiles of some shards: sample numbers in index order."""

    name: str
    root: str
    index: ShardIndex
    samples: Sequence[int]


def source_path(key: str) -> str:
    """The path below the source that a key was made of, without its extension (``data.sources.base.safe_key``)."""
    return unquote(key.replace("~", "/"))


def centers_of(setting: str, tiles: TileSet) -> list[str | None]:
    """Centre of every tile, None where it has none.

    Args:
        setting: ``set``, ``group``, ``vendor`` or ``mpp``; a CSV file with the columns ``center`` and ``key``,
            ``path``, ``slide`` or ``group``; otherwise a regular expression (``first_match``).
        tiles: those of one set.

    Raises:
        InputError: the setting cannot be used, or gives no tile a centre.
    """
    if setting == SET:
        return [tiles.name] * len(tiles.samples)
    keys = [str(key) for shard in tiles.index for key in shard.key]
    groups = tiles.index.groups()
    assign = _assign(setting, tiles, keys, groups)
    found = [assign(int(sample)) for sample in tiles.samples]
    missing = found.count(None)
    if missing == len(found):
        first = source_path(keys[int(tiles.samples[0])]) if found else "none"
        raise InputError(
            f"center is {setting!r}: gives no tile of {tiles.root} a centre; the first is {first!r}, of slide or "
            f"patient {groups[int(tiles.samples[0])] if found else None!r}"
        )
    if missing:
        logger.warning("%s: %d of %d tiles have no centre and are left out of its numbers", tiles.root, missing,
                       len(found))  # fmt: skip
    return found


def _assign(setting: str, tiles: TileSet, keys: Sequence[str], groups: Sequence[str | None]) -> Assign:
    if setting == GROUP:
        return lambda sample: groups[sample]
    if setting in SLIDE_COLUMNS:
        of_slide = _slide_column(setting, Path(tiles.root))
        return lambda sample: of_slide.get(_AT.sub("", source_path(keys[sample])))
    if setting.lower().endswith(".csv"):
        by, table = _read_table(Path(setting))
        names: dict[str, Callable[[int], str | None]] = {
            "key": lambda sample: keys[sample],
            "path": lambda sample: source_path(keys[sample]),
            "slide": lambda sample: _AT.sub("", source_path(keys[sample])),
            GROUP: lambda sample: groups[sample],
        }
        return lambda sample: table.get(names[by](sample) or "")
    pattern = compiled(setting)
    return lambda sample: first_match(pattern, source_path(keys[sample]), groups[sample])


def compiled(setting: str) -> re.Pattern[str]:
    """The regular expression.

    Raises:
        InputError: it is none.
    """
    try:
        return re.compile(setting)
    except re.error as error:
        raise InputError(f"center is {setting!r}: not a regular expression ({error}), a column or a CSV") from None


def first_match(pattern: re.Pattern[str], *texts: str | None) -> str | None:
    """The pattern's first group (or the whole match) in the first text that it is found in; None if in none."""
    for text in texts:
        match = pattern.search(text) if text is not None else None
        if match:
            return (match.group(1) if pattern.groups else match.group(0)) or None
    return None


def _slide_column(column: str, folder: Path) -> Mapping[str, str]:
    path = folder / SLIDES_NAME
    if not path.exists():
        raise InputError(f"center is {column!r}: {path} is missing; only shards of slides have that column")
    values = {record.slide: getattr(record, column) for record in read_rows(path)}
    return {slide: str(value) for slide, value in values.items() if value is not None}


def _read_table(path: Path) -> tuple[str, dict[str, str]]:
    """Column that rows are found by, and the centre of each."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or ())
            by = next((name for name in ("key", "path", "slide", GROUP) if name in columns), None)
            if by is None or _CENTER not in columns:
                raise InputError(
                    f"center is {str(path)!r}: has the columns {', '.join(columns) or 'none'}; give {_CENTER} and one "
                    "of key, path, slide, group"
                )
            return by, {row[by]: row[_CENTER] for row in reader if row[by] and row[_CENTER]}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"center is {str(path)!r}: cannot be read ({error}); give a CSV file") from None
