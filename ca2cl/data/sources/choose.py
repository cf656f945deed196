"""Open a tile source by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ca2cl.common.plugins import find_installed, is_plugin, load_plugin
from ca2cl.data.sources.base import Source, SourceOptions
from ca2cl.data.sources.names import slides_instead
from ca2cl.errors import InputError

_DATASET_FILES = ("dataset_info.json", "state.json", "dataset_dict.json")


def _is_dataset(source: str) -> bool:
    return source.startswith("hf:") or is_saved(Path(source)) or is_parquet(Path(source))


def is_saved(path: Path) -> bool:
    """True for a folder that ``datasets.save_to_disk`` wrote."""
    return any((path / name).is_file() for name in _DATASET_FILES)


def is_parquet(path: Path) -> bool:
    """True for a Parquet file, and for a folder that holds some, or whose folders do."""
    if path.is_dir():
        return any(True for pattern in ("*.parquet", "*/*.parquet") for _ in path.glob(pattern))
    return path.suffix == ".parquet" and path.is_file()


def _is_folder(source: str) -> bool:
    return Path(source).is_dir()


KINDS: tuple[tuple[Callable[[str], bool], str], ...] = (
    (_is_dataset, "ca2cl.data.sources.huggingface:DatasetSource"),
    (_is_folder, "ca2cl.data.sources.image_folder:FolderSource"),
)
"""Test for each kind of source, and its class. The first kind whose test is true opens the source; its class is
imported only then, since ``datasets`` takes seconds."""


GROUP = "ca2cl.sources"
"""Group of entry points by which installed packages name sources: ``NAME:WHERE``."""
_OWN = ("hf",)


def _class_of(source: str) -> tuple[str, str] | None:
    """``module:Class`` and the name that this class opens; None where no kind fits the source."""
    name, colon, rest = source.partition(":")
    if colon and (found := find_installed(GROUP, name, "source", _OWN)):
        return found.path, rest
    own, _, where = source.rpartition(":")
    if is_plugin(own):
        return own, where
    return next(((name, source) for knows, name in KINDS if knows(source)), None)


def is_source(source: str) -> bool:
    """True if some kind of source fits."""
    return _class_of(source) is not None


def not_there(source: str, kinds: str) -> InputError:
    """The error where no kind of source fits.

    Args:
        source: what was given.
        kinds: what may be given.
    """
    path = Path(source)
    if slides := slides_instead(path):
        return InputError(f"{source}: {slides}")
    if path.suffix == ".csv" and path.is_file():
        return InputError(f"{source}: a CSV lists slides: add --mpp 0.5 (micrometres a pixel) to cut tiles from them")
    if path.is_file():
        return InputError(f"{source}: a file, not a folder; give the folder that holds it: {path.parent}")
    return InputError(f"{source}: no such folder; give {kinds}")


def open_source(source: str, options: SourceOptions | None = None, *, mixed: bool = False) -> Source:
    """List ``source``.

    It is a folder of images, a folder by ``datasets.save_to_disk``, Parquet files, ``hf:NAME`` on the hub,
    ``NAME:WHERE``, which opens WHERE with the source that an installed package names so, or ``module:Class:WHERE``,
    with a class of the user's own.

    Args:
        source: what to list.
        options: which labels, columns and groups to take.
        mixed: take images beside class folders, without a label; otherwise such a folder is refused.

    Raises:
        InputError: missing, empty, unreadable, or options that do not fit it.
    """
    found = _class_of(source)
    if found is None:
        raise not_there(source, "a folder of images, a saved dataset, Parquet files or hf:NAME")
    opened: Source = load_plugin(found[0], "source")(found[1], options or SourceOptions(), mixed=mixed)
    return opened
