"""List slides: a file, folder, pattern, CSV or URL."""

from __future__ import annotations

import csv
import fnmatch
import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ca2cl.data.sources.names import is_clutter, shown
from ca2cl.data.transfer.errors import shown as redacted
from ca2cl.errors import InputError
from ca2cl.slides.readers.base import SlideError, plausible_mpp
from ca2cl.slides.readers.open import PICTURES, PYRAMIDS

COLUMNS = ("slide", "patient", "label", "mpp", "split")


@dataclass(frozen=True)
class SlideFile:
    """A slide of the list."""

    name: str
    """Unique in the list: the path below the folder or the CSV's folder, without extension where that is unique."""
    path: str
    """Where it is; a URL for remote ones."""
    patient: str | None = None
    label: str | None = None
    mpp: float | None = None
    """As the CSV states it."""
    state: tuple[int, ...] = ()
    """Size and modification time of a local file."""

    @property
    def where(self) -> str:
        """Its path for people; of a URL without passwords and signatures."""
        return redacted(self.path) if is_remote(self.path) else self.path


@dataclass(frozen=True)
class Listing:
    """Slides by name."""

    name: str
    slides: tuple[SlideFile, ...]
    digest: str
    """Changes with their names, patients, labels and stated resolution, not with their content."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Classes of the CSV, sorted."""
        return tuple(sorted({slide.label for slide in self.slides if slide.label is not None}))


def list_slides(source: str, split: str | None = None) -> Listing:
    """The slides of ``source``.

    Args:
        source: a slide, a folder (with those below it), a pattern, or a CSV with the columns ``COLUMNS``, of which
            ``slide`` alone is needed.
        split: value of the CSV's column that is taken.

    Raises:
        InputError: there is none, or the CSV cannot be used.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() == ".csv" and path.is_file():
        return _listing(path.stem, _read_csv(path, split), path.parent)
    if is_remote(source):
        if Path(source).suffix[1:].lower() in PYRAMIDS | PICTURES:
            return _listing(Path(source).stem, [{"slide": source}], Path())
        raise InputError(f"{source}: not a slide; give the URL of one, or a CSV with a URL in each line")
    if path.suffix.lower() == ".csv" and not path.exists():
        raise InputError(f"{source}: no such file; give a CSV with the columns {', '.join(COLUMNS)}, or slides")
    if split is not None:
        raise InputError(f"split is {split!r}: slides have splits in a CSV's column only; give a CSV, or leave it out")
    if path.is_dir():
        found = sorted(_walk(path))
        folder = path
    elif path.is_file():
        found, folder = [path], path.parent
    else:
        matches = sorted(Path(name) for name in glob.glob(source, recursive=True))  # noqa: PTH207 - an absolute pattern
        found = [one for one in matches if one.is_file() and _is_slide(one)]
        folder = Path(os.path.commonpath([one.parent for one in found])) if found else path.parent
    if not found:
        known = " ".join(sorted(PYRAMIDS | PICTURES))
        raise InputError(f"{source}: no slides here; give a slide, a folder, a quoted pattern or a CSV; known: {known}")
    slides = [{"slide": os.path.relpath(one, folder)} for one in found]
    return _listing(shown(path.resolve().name), slides, folder)


def assumed_mpp(slide: SlideFile, rules: Iterable[str]) -> float | None:
    """The value of the first rule PATTERN=VALUE that the slide's name or path matches."""
    for rule in rules:
        pattern, _, value = rule.rpartition("=")
        if any(fnmatch.fnmatch(text, pattern) for text in (slide.path, Path(slide.path).name, slide.name)):
            return float(value)
    return None


def resolution(slide: SlideFile, stated: float | None, hint: str, rules: Sequence[str]) -> tuple[float, str]:
    """Micrometres a pixel of level 0, and where they are from: ``csv``, ``slide`` or ``assumed``.

    Raises:
        SlideError: nobody states them.
    """
    for value, origin in ((slide.mpp, "csv"), (stated, "slide"), (assumed_mpp(slide, rules), "assumed")):
        if value is not None:
            return value, origin
    about = f" ({hint})" if hint else ""
    raise SlideError(
        f"states no micrometres a pixel{about}; give them in the CSV's column mpp, or by --assume_mpp "
        f"'{Path(slide.path).name}=VALUE'"
    )


def is_remote(path: str) -> bool:
    """True for a URL."""
    return "://" in path


def _is_slide(path: Path) -> bool:
    return path.suffix[1:].lower() in PYRAMIDS | PICTURES and not is_clutter(path.name)


def _walk(folder: Path) -> Iterable[Path]:
    """Slides below a folder; those inside the folder of an MRXS slide are parts of it."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from None
    parts = {entry.with_suffix("") for entry in entries if entry.suffix.lower() == ".mrxs"}
    for entry in entries:
        if entry.is_dir() and entry not in parts and not is_clutter(entry.name):
            yield from _walk(entry)
        elif _is_slide(entry) and entry.is_file():
            yield entry


def _read_csv(path: Path, split: str | None) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            rows = [{k: (v or "").strip() for k, v in row.items() if k in COLUMNS} for row in reader]
            names = reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV that can be read ({error}); save it as UTF-8 with commas") from None
    if "slide" not in names:
        if any(";" in name for name in names):
            raise InputError(f"{path}: has semicolons between its columns ({names[0]}); save it with commas")
        known = ", ".join(COLUMNS)
        raise InputError(f"{path}: has no column slide but {', '.join(names) or 'nothing'}; its columns are {known}")
    for number, row in enumerate(rows, start=2):
        if not row["slide"]:
            raise InputError(f"{path}: line {number} names no slide; give its path in the column slide")
        if row.get("mpp") and plausible_mpp(row["mpp"]) is None:
            raise InputError(f"{path}: line {number} has mpp {row['mpp']!r}; give micrometres a pixel, such as 0.25")
    if not rows:
        raise InputError(f"{path}: lists no slide; give the path of one in each line")
    splits = sorted({row.get("split", "") for row in rows})
    if split is None and len(splits) > 1:
        raise InputError(f"{path}: has the splits {', '.join(map(repr, splits))}; choose one by --split")
    chosen = [row for row in rows if split is None or row.get("split") == split]
    if not chosen:
        raise InputError(f"{path}: no slide of split {split!r}; it has {', '.join(map(repr, splits)) or 'none'}")
    return chosen


def _listing(name: str, rows: Sequence[dict[str, str]], folder: Path) -> Listing:
    """The listing of these rows, whose paths are relative to ``folder`` unless absolute or URLs."""
    paths = [row["slide"] if is_remote(row["slide"]) else os.path.normpath(row["slide"]) for row in rows]
    stems = [_stem(given) for given in paths]
    unique = len(set(stems)) == len(stems)
    slides = []
    for row, given, stem in zip(rows, paths, stems, strict=True):
        path = given if is_remote(given) else str(folder / Path(given).expanduser())
        slides.append(
            SlideFile(
                name=shown(stem if unique else _whole(given)),
                path=path,
                patient=row.get("patient") or None,
                label=row.get("label") or None,
                mpp=float(row["mpp"]) if row.get("mpp") else None,
                state=file_state(path),
            )
        )
    if twice := [name for name, count in Counter(slide.name for slide in slides).items() if count > 1]:
        raise InputError(f"{twice[0]}: the slide is listed twice; take one of them off")
    if any(slide.label for slide in slides) and (bare := [slide.name for slide in slides if not slide.label]):
        raise InputError(f"{len(bare)} slides have no label ({bare[0]} first), but others have; give all or none one")
    facts = [[slide.name, slide.patient, slide.label, slide.mpp] for slide in slides]
    return Listing(name, tuple(slides), hashlib.sha256(json.dumps(facts).encode()).hexdigest())


def _stem(path: str) -> str:
    """A slide's path without its extension; of a URL that in its store."""
    if is_remote(path):
        path = urlsplit(path).path.lstrip("/")
    head, slash, last = path.rpartition("/")
    return head + slash + (last.rpartition(".")[0] or last)


def _whole(path: str) -> str:
    return "".join(urlsplit(path)[1:3]) if is_remote(path) else path


def file_state(path: str | Path) -> tuple[int, ...]:
    """Size and modification time of a local slide; nothing of a missing or remote one."""
    try:
        status = Path(path).stat()
    except OSError:
        return ()
    return status.st_size, status.st_mtime_ns
