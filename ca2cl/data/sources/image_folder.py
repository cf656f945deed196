"""Tile source for a tree of class folders."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ca2cl.data.sources.base import SourceOptions, Tile, TileReader, safe_key
from ca2cl.data.sources.class_folders import mistaken
from ca2cl.data.sources.names import as_text, is_clutter, shown, slides_instead
from ca2cl.errors import InputError

logger = logging.getLogger(__name__)
EXTENSIONS = frozenset({"tif", "tiff", "png", "jpg", "jpeg", "bmp", "webp"})


class FolderSource:
    """Images below a folder, labelled by the name of the folder just below it.

    A lone folder that itself holds only folders is stepped into (archives unzip that way); images directly in the
    folder are unlabelled, and lie beside class folders only with ``mixed``. What systems leave behind
    (``names.is_clutter``) and other file types are ignored. Links are followed; one that leads nowhere is an error, and
    an empty class folder a warning: both are what a disk that is away looks like.
    """

    def __init__(self, source: str, options: SourceOptions, *, mixed: bool = False) -> None:
        root = Path(source)
        self.name = shown(root.resolve().name)
        given, root = root, _step_into(root)
        if root != given:
            logger.info("class folders are taken from %s", shown(str(root)))
        self.root = root
        broken: list[str] = []
        found = sorted(_walk(root, "", (), broken))
        _refuse_broken(root, broken)
        if not found:
            kinds = " ".join(sorted(EXTENSIONS))
            remedy = f"no images here; give a folder of class folders with files of {kinds}"
            raise InputError(f"{given}: {slides_instead(given) or remedy}")
        self.digest = _listing_digest(found)
        self._names = [name for name, _, _ in found]
        self.classes, self.labels = self._label(options, mixed)
        self._pattern = self._group_pattern(options.group_pattern)
        self.ungrouped = self._without_group()
        # a.png beside a.tif: then every key of the source carries the extension, so that keys stay one to one
        self._whole = len({_stem(name) for name in self._names}) != len(self._names)
        self.reader: TileReader = FileReader(str(root))

    def _label(self, options: SourceOptions, mixed: bool) -> tuple[list[str], npt.NDArray[np.int32]]:
        if options.unlabelled:
            return [], np.full(len(self._names), -1, np.int32)
        loose = [name for name in self._names if "/" not in name]
        if loose and len(loose) < len(self._names) and not mixed:
            inside = next(name for name in self._names if "/" in name).split("/")[0]
            raise InputError(
                f"{self.root}: holds both images ({loose[0]}) and class folders ({inside}); "
                "move one of them away, or use --unlabelled true"
            )
        mistake = mistaken(self._names) if options.check_classes and not mixed else None
        if mistake is not None:
            inside = self._names[0].partition("/")[0]
            raise InputError(
                f"{self.root}: {shown(mistake)}; shard one folder at a time, as in `ca2cl shard "
                f"{shown(str(self.root / inside))} OUT/{shown(inside)}`, or use --unlabelled true, or --check_classes "
                "false where the folders are classes"
            )
        folders = [name.rpartition("/")[0].partition("/")[0] for name in self._names]  # "" for a loose image
        named = _class_names(self.root, sorted(set(folders) - {""}))
        classes = sorted(named.values())
        number = {"": -1, **{folder: classes.index(name) for folder, name in named.items()}}
        return classes, np.fromiter((number[folder] for folder in folders), np.int32, len(folders))

    def _group_pattern(self, pattern: str | None) -> re.Pattern[str] | None:
        if pattern is None:
            return None
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise InputError(f"group_pattern is {pattern!r}: not a regular expression ({error})") from None
        return compiled

    def _without_group(self) -> list[int]:
        if self._pattern is None:
            return []
        missing = [row for row, name in enumerate(self._names) if self._group(name) is None]
        if len(missing) == len(self._names):
            raise InputError(
                f"group_pattern is {self._pattern.pattern!r}: matches no file; the first is {self._names[0]!r}"
            )
        return missing

    def _group(self, name: str) -> str | None:
        """The slide or patient of a file; one without letters is none: all such files would be one slide."""
        match = self._pattern.search(name) if self._pattern else None
        return ((match.group(1) if match.re.groups else match.group(0)) or None) if match else None

    def __len__(self) -> int:
        return len(self._names)

    def tiles(self, rows: Iterable[int]) -> list[Tile]:
        """The tiles with these numbers (in sorted order of paths)."""
        return [self._tile(int(row)) for row in rows]

    def _tile(self, row: int) -> Tile:
        name = self._names[row]
        group = self._group(name)
        group = shown(group) if group is not None else None
        key = safe_key(name if self._whole else _stem(name))
        ext = name.rsplit(".", 1)[1].lower()
        return Tile(key=key, name=name, row=row, label=int(self.labels[row]), group=group, ext=ext)


@dataclass(frozen=True)
class FileReader:
    """Reads tiles of a ``FolderSource``."""

    root: str

    def where(self, tile: Tile) -> str:
        return f"{self.root}/{tile.name}"

    def read(self, tile: Tile) -> bytes:
        try:
            with open(self.where(tile), "rb", buffering=0) as file:  # noqa: PTH123 - a path's object takes as long
                return file.readall()
        except OSError as error:
            raise InputError(
                f"{self.where(tile)}: cannot be read ({error.strerror}); restore it or use --bad skip"
            ) from None


def _stem(name: str) -> str:
    return name.rsplit(".", 1)[0]


def _is_image(name: str) -> bool:
    stem, dot, ext = name.rpartition(".")
    return bool(stem and dot) and ext.lower() in EXTENSIONS


def _class_names(root: Path, folders: Sequence[str]) -> dict[str, str]:
    """Class folder → name of its class.

    An empty folder beside them is no class and gives a warning: a cohort may lack a class, but a disk that is away
    looks the same.

    Raises:
        InputError: a name that is not UTF-8, which no manifest, table or store could hold; two folders of one name.
    """
    named: dict[str, str] = {}
    for folder in folders:
        name = as_text(folder)
        if name is None:
            raise InputError(
                f"{root}: the name of the class folder {os.fsencode(folder)!r} is not UTF-8; rename it, or all of them "
                "with convmv -f latin1 -t utf8 -r --notest FOLDER"
            )
        twin = next((other for other, known in named.items() if known == name), None)
        if twin is not None:
            raise InputError(
                f"{root}: the class folder {name} is there twice, once with letters taken apart; join them"
            )
        named[folder] = name
    for entry in _entries(root) if folders else ():
        if entry.name not in named and entry.is_dir() and not any(_entries(root / entry.name)):
            logger.warning(
                "%s: an empty class folder, which makes no class; mount the disk if its tiles lie on another",
                root / entry.name,
            )
    return named


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield the entries of a folder, without system clutter."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not is_clutter(entry.name):
                    yield entry
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from None


def _walk(
    root: Path, below: str, parents: tuple[tuple[int, int], ...], broken: list[str]
) -> Iterator[tuple[str, int, int]]:
    """Yield path below ``root``, size and modification time of every image, in no particular order.

    Args:
        broken: gets the paths of links that lead nowhere.
    """
    folder = root / below
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in parents:
        raise InputError(f"{folder}: a link back to a folder that holds it; remove the link")
    for entry in _entries(folder):
        try:
            found = entry.stat()
        except OSError as error:  # also a link to itself, or a share that is gone
            if not entry.is_symlink():
                raise InputError(f"{entry.path}: cannot be read ({error.strerror}); check the disk") from None
            broken.append(below + entry.name)
            continue
        if stat.S_ISDIR(found.st_mode):
            yield from _walk(root, f"{below}{entry.name}/", (*parents, here), broken)
        elif _is_image(entry.name) and stat.S_ISREG(found.st_mode):
            yield below + entry.name, found.st_size, found.st_mtime_ns


def _refuse_broken(root: Path, broken: Sequence[str]) -> None:
    if broken:
        first = root / min(broken)
        raise InputError(
            f"{first}: a link to {first.readlink()}, which is not there, as {len(broken)} links in the folder are; "
            "mount the disk that they lead to, or remove them"
        )


def _step_into(root: Path) -> Path:
    """``root``, or the lone folder in it that holds the class folders."""
    while True:
        entries = list(_entries(root))
        folders = [entry.name for entry in entries if _may_be_folder(entry)]
        if len(folders) != 1 or any(_is_image(entry.name) for entry in entries) or not (root / folders[0]).is_dir():
            return root
        inner = list(_entries(root / folders[0]))
        if any(_is_image(entry.name) for entry in inner) or not any(map(_may_be_folder, inner)):
            return root
        root = root / folders[0]


def _may_be_folder(entry: os.DirEntry[str]) -> bool:
    """True for a folder, and for a link to nowhere, which may have led to one."""
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and not Path(entry.path).is_file())


def _listing_digest(found: Sequence[tuple[str, int, int]]) -> str:
    digest = hashlib.sha256()
    for name, size, modified in found:
        digest.update(os.fsencode(f"{name}\0{size}\0{modified}\n"))
    return digest.hexdigest()
