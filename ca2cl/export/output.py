"""Check and create the output path, atomically.

Everything is written into a hidden folder beside OUT under its final names, looked at there, and renamed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ca2cl.common.files import fsync, replacing, sync_replace, writing
from ca2cl.errors import InputError
from ca2cl.models.encoder_io import CARD_NAME, WEIGHTS_NAME

_REMEDY = "free space or give a path in a folder that you can write"


def check_out(out: Path, suffixes: Sequence[str], target: str, overwrite: bool) -> None:
    """Refuse an OUT that cannot be written, before any work.

    Args:
        suffixes: that the target's files may have; none where OUT is a folder.
        overwrite: whether something of the same kind may be there.

    Raises:
        InputError: wrong suffix, something there, or a folder that cannot be written.
    """
    if suffixes and out.suffix not in suffixes:
        raise InputError(f"{out}: {target} reads {' or '.join(suffixes)}; give such a file's name")
    if not suffixes and out.suffix in (".safetensors", ".pth", ".pt", ".onnx", ".json"):
        raise InputError(f"{out}: {target} makes a folder of weights and card; give a name without {out.suffix}")
    check_free(out, bool(suffixes), overwrite)
    above = next(folder for folder in out.parents if os.path.lexists(folder))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{out}: {above} is not a folder that can be written; {_REMEDY}")


def check_free(path: Path, file: bool, overwrite: bool) -> None:
    """Refuse a place that is taken.

    Raises:
        InputError: something is there that is of another kind, or may not be replaced.
    """
    if not os.path.lexists(path):
        return
    if path.is_dir() == file:
        raise InputError(f"{path}: a {'folder' if file else 'file'} is there; give another name")
    if not overwrite:
        raise InputError(f"{path}: is there already; add --overwrite, or give another name")
    # A folder is replaced as a whole: so it must hold nothing but an encoder.
    others = [] if file else sorted({entry.name for entry in path.iterdir()} - {CARD_NAME, WEIGHTS_NAME})
    if others:
        raise InputError(f"{path}: holds more than an encoder (such as {others[0]}); give a folder of its own")


@contextmanager
def staged(files: Mapping[str, bytes], out: Path) -> Iterator[Path]:
    """Write ``files`` where they can be tried out; when the block ends without an error they take their places.

    Args:
        files: names relative to the folder of ``out`` → content; in this order they take their places.

    Yields:
        ``out`` as it lies now.

    Raises:
        InputError: the disk is full, or a folder cannot be written. Nothing is left then.
    """
    with writing(out, _REMEDY):
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=f".{out.name[:32]}.", dir=out.parent)
    with scratch as folder:
        for name, content in files.items():
            path = Path(folder) / name
            with writing(out.parent / name, _REMEDY):
                path.parent.mkdir(exist_ok=True)
                with replacing(path) as file:
                    file.write(content)
        yield Path(folder) / out.name
        for name in dict.fromkeys(name.partition("/")[0] for name in files):
            _move(Path(folder) / name, out.parent / name)


def _move(path: Path, place: Path) -> None:
    if path.is_file():
        sync_replace(path, place, _REMEDY)
        return
    with writing(place, _REMEDY):
        old = path.with_name(f"{path.name}.old")
        if place.exists():  # no rename puts a folder in the place of one that is not empty
            place.rename(old)
        try:
            path.rename(place)
        except OSError:
            if old.exists():
                old.rename(place)
            raise
        fsync(place.parent)
