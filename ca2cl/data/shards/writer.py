"""Check, encode and write one shard as a WebDataset tar.

The tar is written by ``tar``: ``webdataset.TarWriter`` reports no offsets, which the index needs, and ``TarFile`` finds
them only by reading the tar again.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ca2cl.common.files import file_digest, replacing, write_atomic, writing
from ca2cl.common.records import parse_json
from ca2cl.data.decode import MAX_PIXELS, BadSample, decode, measure
from ca2cl.data.orientation import as_stored, orientation_of, stored_size
from ca2cl.data.shards.config import ShardConfig
from ca2cl.data.shards.samples import ShardInfo, ShardSamples
from ca2cl.data.shards.tar import TarWriter
from ca2cl.data.sources.base import Content, Tile, TileReader
from ca2cl.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

REMEDY = "free some space and run again, finished shards are kept; or give another folder"
PLAN_FOLDER = ".plan"
_ABOUT = json.JSONEncoder(sort_keys=True)
_MAGIC = {b"\xff\xd8": "jpg", b"II": "tif", b"MM": "tif"}
_FORMATS = {"JPEG": "jpg", "PNG": "png", "TIFF": "tif", "WEBP": "webp", "BMP": "bmp"}


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Checks and encoding of every tile of a set of shards."""

    config: ShardConfig
    source: str
    """The source's name."""
    classes: tuple[str, ...]
    tile_size: tuple[int, int] | None
    """Height and width that every tile must come with; None where resizing makes them equal."""
    reference: str
    """A tile that has ``tile_size``."""


@dataclass(frozen=True)
class Packed:
    """A finished shard: its tar, the samples in it, one line about every tile left out."""

    info: ShardInfo
    samples: ShardSamples
    skipped: list[str]
    turned: int = 0
    """Tiles with an orientation in which they are to be shown turned (``orientation``)."""


@contextmanager
def _opened(data: Content, where: str) -> Iterator[Image.Image]:
    """The image in ``data``; any fault of it becomes an InputError of one line about ``where``."""
    from PIL import Image, UnidentifiedImageError

    if not isinstance(data, bytes):
        yield Image.fromarray(check_pixels(data, where))
        return
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
        raise InputError(f"{where}: does not decode as an image; restore it or use --bad skip") from None
    except (OSError, ValueError, SyntaxError, EOFError, ArithmeticError) as error:
        raise InputError(f"{where}: does not decode as an image ({error}); restore it or use --bad skip") from None


def check_pixels(pixels: npt.NDArray[np.uint8], where: str) -> npt.NDArray[np.uint8]:
    """The same RGB pixels (H, W, 3).

    Raises:
        InputError: another type, shape or size.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not 0 < pixels.size <= 3 * MAX_PIXELS:
        raise InputError(
            f"{where}: its source gave {pixels.dtype} {pixels.shape}, not uint8 (H, W, 3); mend the source"
        )
    return pixels


def image_size(data: Content, where: str) -> tuple[int, int]:
    """Height and width in pixels; of an encoded image from its header.

    Raises:
        InputError: not an image, or more than ``MAX_PIXELS`` pixels.
    """
    with suppress(BadSample):
        if isinstance(data, bytes) and (size := measure(data, whole=False)) is not None:
            return size
    with _opened(data, where) as image:
        return stored_size(image)


def prepare(data: Content, tile: Tile, where: str, packing: Packing) -> tuple[bytes, str]:
    """A tile's bytes as they go into the shard, and their extension. Pixels that are kept as they come become PNG.

    Args:
        data: what the source's reader gave.
        tile: which one.
        where: its full name, for messages.
        packing: what every tile must be, and becomes.

    Raises:
        InputError: the tile does not decode or has another size than the reference.
    """
    if packing.config.encode == "keep" and isinstance(data, bytes) and _passes(data, packing):
        return data, tile.ext or _MAGIC[data[:2]]
    with _opened(data, where) as image:
        size = stored_size(image)
        if packing.tile_size is not None and size != packing.tile_size:
            height, width = packing.tile_size
            raise InputError(
                f"{where}: {size[1]} x {size[0]} pixels, but {packing.reference}: {width} x {height}; tiles must have "
                "one size: separate them, skip them with --bad skip, or use --encode png --resize PX"
            )
        config = packing.config
        if config.encode == "keep" and isinstance(data, bytes):
            if config.check == "full":
                _decode(data, where)
            # what PIL calls MPO is a JPEG with more behind it
            return data, tile.ext or _FORMATS.get(image.format or "", "jpg")
        encode = "png" if config.encode == "keep" else config.encode
        return _encode(image, encode, config), _FORMATS[encode.upper()]


def _passes(data: bytes, packing: Packing) -> bool:
    """True for a JPEG or uncompressed TIFF that the decoder takes and that has the size of all."""
    try:
        return measure(data, whole=packing.config.check == "full") == packing.tile_size
    except BadSample:
        return False


def _decode(data: bytes, where: str) -> None:
    """Decode as training will: what fails here would be missing there in every epoch."""
    try:
        decode(data)
    except BadSample as error:
        raise InputError(f"{where}: does not decode as an image ({error}); restore it or use --bad skip") from None


def _encode(image: Image.Image, encode: str, config: ShardConfig) -> bytes:
    from PIL.Image import Resampling

    image = as_stored(image).convert("RGB")
    if config.resize is not None:
        image = image.resize((config.resize, config.resize), Resampling.LANCZOS)
    out = io.BytesIO()
    if encode == "png":
        image.save(out, "PNG")
    elif encode == "webp":
        image.save(out, "WEBP", quality=config.quality)
    else:
        # 4:4:4: stain differences between neighbouring nuclei are chroma, which subsampling would halve
        image.save(out, "JPEG", quality=config.quality, subsampling=0)
    return out.getvalue()


def pack(path: Path, tiles: Sequence[Tile], reader: TileReader, packing: Packing) -> Packed:
    """Write ``tiles`` as the tar ``path``, whole or not at all; equal input gives equal bytes.

    Args:
        path: the tar.
        tiles: what goes into it, in order.
        reader: reads them.
        packing: what every tile must be, and becomes.

    Raises:
        InputError: a tile that cannot be read, does not decode or has another size, or a failure to write.
    """
    kept: list[Tile] = []
    offsets, sizes, exts, skipped = [], [], [], []
    turned = 0
    with writing(path, REMEDY), replacing(path) as file:
        tar = TarWriter(file)
        for tile in tiles:
            try:
                came = reader.read(tile)
                data, ext = prepare(came, tile, reader.where(tile), packing)
            except InputError as error:
                if packing.config.bad == "stop":
                    raise
                skipped.append(str(error))
                continue
            label, about = str(tile.label).encode(), _about(tile, packing)
            offsets.append(tar.add(tile.key, {ext: data, "cls": label, "json": about}))
            kept.append(tile)
            turned += isinstance(came, bytes) and orientation_of(came) != 1
            sizes.append(len(data))
            exts.append(ext)
        tar.close()
    info = ShardInfo(name=path.name, bytes=tar.length, sha256=tar.sha256.hexdigest(), samples=len(kept))
    samples = ShardSamples(
        key=[tile.key for tile in kept],
        ext=exts,
        offset=np.array(offsets, np.int64),
        size=np.array(sizes, np.int64),
        label=np.array([tile.label for tile in kept], np.int32),
        group=[tile.group for tile in kept],
    )
    return Packed(info, samples, skipped, turned)


def _about(tile: Tile, packing: Packing) -> bytes:
    about: dict[str, str | int | float] = {**tile.meta, "source": packing.source, "name": tile.name}
    if tile.label >= 0:
        about["class"] = packing.classes[tile.label]
    if tile.group is not None:
        about["group"] = tile.group
    return _ABOUT.encode(about).encode()


def write_sidecar(path: Path, packed: Packed) -> None:
    """Record the content of a finished tar, so that a restarted run does not write it again."""
    samples = packed.samples
    rows = {name: np.asarray(getattr(samples, name)).tolist() for name in ("offset", "size", "label")}
    rows |= {name: list(getattr(samples, name)) for name in ("key", "ext", "group")}
    content = {"info": asdict(packed.info), "samples": rows, "skipped": packed.skipped, "turned": packed.turned}
    write_atomic(path, json.dumps(content).encode(), REMEDY)


def read_sidecar(path: Path) -> Packed:
    """Read what ``write_sidecar`` wrote.

    Raises:
        OSError, ValueError, KeyError, TypeError: it is missing or damaged.
    """
    content = parse_json(path.read_bytes())
    rows = content["samples"]
    for name, kind in (("offset", np.int64), ("size", np.int64), ("label", np.int32)):
        rows[name] = np.array(rows[name], kind)
    return Packed(
        ShardInfo(**content["info"]), ShardSamples(**rows), list(content["skipped"]), content.get("turned", 0)
    )


def shard_path(out: Path, number: int) -> Path:
    return out / f"shard-{number:06d}.tar"


def sidecar_path(out: Path, name: str) -> Path:
    return out / PLAN_FOLDER / f"{name}.json"


def make_shard(path: Path, tiles: list[Tile], reader: TileReader, packing: Packing) -> ShardInfo:
    """Write one shard, unless an earlier run finished it.

    Args:
        path: of the tar.
        tiles: in order.
        reader: reads them.
        packing: checks and encoding.
    """
    sidecar = sidecar_path(path.parent, path.name)
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = read_sidecar(sidecar)
        info = known.info
        wanted = not known.skipped or packing.config.bad == "skip"
        if wanted and path.stat().st_size == info.bytes and file_digest(path) == info.sha256:
            return info
    packed = pack(path, tiles, reader, packing)
    write_sidecar(sidecar, packed)
    return packed.info
