"""One shard: its tiles checked, re-encoded if asked, and written as a WebDataset tar.

The tar is written by the standard library and not by ``webdataset.TarWriter``: the index needs every tile's offset in
the tar, and members must be reproducible bytes (no clock, no owner); TarWriter tells no offsets.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from ca2cl.data.index import ShardInfo, ShardSamples
from ca2cl.data.sources import Tile, TileReader
from ca2cl.errors import InputError

MAX_PIXELS = 64 * 1024 * 1024
_FORMATS = {"JPEG": "jpg", "PNG": "png", "TIFF": "tif", "WEBP": "webp", "BMP": "bmp"}
_ENCODED_EXT = {"jpeg": "jpg", "webp": "webp", "png": "png"}


@dataclass(frozen=True, kw_only=True)
class Packing:
    """What every tile of a set of shards must be, and becomes."""

    source: str
    classes: tuple[str, ...]
    encode: str
    """keep, jpeg, webp or png."""
    quality: int
    resize: int | None
    """Side in pixels that tiles are resized to; needs an ``encode`` other than keep."""
    tile_size: tuple[int, int] | None
    """Height and width that every tile must come with; None where resizing makes them equal."""
    reference: str
    """The tile that ``tile_size`` was taken from."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write ``path`` (full disk, no permission) into the user's one line."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); free space or give another folder and run again, "
            "finished shards are kept"
        ) from None


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that after any crash the file is whole or absent."""
    with writing(path), _replacing(path) as file:
        file.write(data)


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_replace(temporary: Path, path: Path) -> None:
    """Bring a file that a library wrote to ``temporary`` to its place for good."""
    with writing(path):
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)


@contextmanager
def _opened(data: bytes, where: str) -> Iterator[Image.Image]:
    """The image in ``data``; anything that is wrong with it becomes one line about ``where``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns about large images; the limit below is ours
            with Image.open(io.BytesIO(data), formats=list(_FORMATS)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise InputError(f"{where}: {image.width} x {image.height} pixels; cut it into tiles first")
                yield image
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise InputError(f"{where}: far too many pixels; cut it into tiles first") from None
    except UnidentifiedImageError:
        raise InputError(f"{where}: does not decode as an image; restore or remove it") from None
    except (OSError, ValueError, SyntaxError, EOFError, ArithmeticError) as error:
        raise InputError(f"{where}: does not decode as an image ({error}); restore or remove it") from None


def image_size(data: bytes, where: str) -> tuple[int, int]:
    """Height and width in pixels from the header of an encoded image.

    Raises:
        InputError: not an image, or more than ``MAX_PIXELS`` pixels.
    """
    with _opened(data, where) as image:
        return image.height, image.width


def prepare(data: bytes, tile: Tile, where: str, packing: Packing) -> tuple[bytes, str]:
    """A tile's bytes as they go into the shard, and their extension.

    Raises:
        InputError: the tile does not decode or has another size than the reference.
    """
    with _opened(data, where) as image:
        size = (image.height, image.width)
        if packing.tile_size is not None and size != packing.tile_size:
            height, width = packing.tile_size
            raise InputError(
                f"{where}: {size[1]} x {size[0]} pixels, but {packing.reference}: {width} x {height}; tiles must have "
                "one size: separate them, or use --encode png --resize PX"
            )
        if packing.encode == "keep":
            # what PIL calls MPO is a JPEG with more behind it
            return data, tile.ext or _FORMATS.get(image.format or "", "jpg")
        return _encode(image, packing), _ENCODED_EXT[packing.encode]


def _encode(image: Image.Image, packing: Packing) -> bytes:
    image = image.convert("RGB")
    if packing.resize is not None:
        image = image.resize((packing.resize, packing.resize), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    if packing.encode == "png":
        image.save(out, "PNG")
    elif packing.encode == "webp":
        image.save(out, "WEBP", quality=packing.quality)
    else:
        # 4:4:4: stain differences between neighbouring nuclei are chroma, which subsampling would halve
        image.save(out, "JPEG", quality=packing.quality, subsampling=0)
    return out.getvalue()


class _HashedFile(io.RawIOBase):
    """A file being written that knows its SHA-256 and length, so that a tar is not read again."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.length = 0

    def write(self, data: Any) -> int:
        self._file.write(data)
        self.sha256.update(data)
        self.length += len(data)
        return len(data)

    def tell(self) -> int:
        return self.length


def pack(path: Path, tiles: Sequence[Tile], reader: TileReader, packing: Packing) -> tuple[ShardInfo, ShardSamples]:
    """Write ``tiles`` as the tar ``path``, whole or not at all; equal input gives equal bytes.

    Raises:
        InputError: a tile that cannot be read, does not decode or has another size, or a failure to write.
    """
    offsets, sizes, exts = [], [], []
    with writing(path), _replacing(path) as file:
        hashed = _HashedFile(file)
        with tarfile.open(fileobj=hashed, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for tile in tiles:
                data, ext = prepare(reader.read(tile), tile, reader.where(tile), packing)
                offsets.append(_add(tar, hashed, f"{tile.key}.{ext}", data))
                _add(tar, hashed, f"{tile.key}.cls", str(tile.label).encode())
                _add(tar, hashed, f"{tile.key}.json", _about(tile, packing))
                sizes.append(len(data))
                exts.append(ext)
    info = ShardInfo(name=path.name, bytes=hashed.length, sha256=hashed.sha256.hexdigest(), samples=len(tiles))
    samples = ShardSamples(
        key=[tile.key for tile in tiles],
        ext=exts,
        offset=np.array(offsets, np.int64),
        size=np.array(sizes, np.int64),
        label=np.array([tile.label for tile in tiles], np.int32),
        group=[tile.group for tile in tiles],
    )
    return info, samples


def _add(tar: tarfile.TarFile, file: _HashedFile, name: str, data: bytes) -> int:
    """Add one member; the offset of its bytes in the tar."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    member.mode = 0o644
    tar.addfile(member, io.BytesIO(data))
    tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every member in memory otherwise
    padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return file.length - padded


def _about(tile: Tile, packing: Packing) -> bytes:
    about: dict[str, str | int] = {"source": packing.source, "name": tile.name}
    if tile.label >= 0:
        about["class"] = packing.classes[tile.label]
    if tile.group is not None:
        about["group"] = tile.group
    return json.dumps(about, sort_keys=True).encode()


def write_sidecar(path: Path, info: ShardInfo, samples: ShardSamples) -> None:
    """Note what a finished tar holds, so that a restarted run need not write it again."""
    rows = {name: np.asarray(getattr(samples, name)).tolist() for name in ("offset", "size", "label")}
    rows |= {name: list(getattr(samples, name)) for name in ("key", "ext", "group")}
    write_atomic(path, json.dumps({"info": asdict(info), "samples": rows}).encode())


def read_sidecar(path: Path) -> tuple[ShardInfo, ShardSamples]:
    """What ``write_sidecar`` noted. OSError, ValueError, KeyError or TypeError if it is missing or damaged."""
    content = json.loads(path.read_bytes())
    rows = content["samples"]
    for name, kind in (("offset", np.int64), ("size", np.int64), ("label", np.int32)):
        rows[name] = np.array(rows[name], kind)
    return ShardInfo(**content["info"]), ShardSamples(**rows)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
