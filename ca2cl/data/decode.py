"""Decode one tile's bytes to RGB pixels.

JPEG goes through libjpeg-turbo (simplejpeg) with the accurate DCT and smooth chroma upsampling, so that pixels equal
Pillow's; the fast variants differ by a few grey levels and would make a tile depend on who decoded it. What
libjpeg-turbo warns of (damaged or missing data, which it would paint over in grey) is a bad sample. Uncompressed
RGB TIFF, the format of NCT-CRC-HE, is a header in front of pixels and is copied straight out of it. The rest is
Pillow's, which is imported only for it. In every format pixels are as they are stored, however they are to be shown
(``orientation``).
Legend: H, W height and width in pixels.
"""

from __future__ import annotations

import io
import struct

import numpy as np
import numpy.typing as npt
import simplejpeg

from ca2cl.data.orientation import as_stored, stored_size

MAX_PIXELS = 64 * 2**20
"""Largest H * W that is decoded: a tile is far smaller, a decompression bomb is not."""

_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP")
# Wider than 8 bits: Pillow's conversion to RGB clips instead of scaling, which would be a silent error.
_WIDE_MODES = frozenset({"I", "F", "I;16", "I;16B", "I;16L", "I;16N"})
# What Pillow's parsers raise on damaged bytes beside its own errors. A programming error of ours is none of these.
PILLOW_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
)

_SAMPLINGS = frozenset({"444", "422", "420", "440", "411", "Gray"})
_MOST_REDUCED = 8

Pixels = npt.NDArray[np.uint8]


class BadSample(ValueError):
    """A sample that cannot become a tile: undecodable, of another size, or implausibly large."""


def decode(data: bytes, *, expect: tuple[int, int] | None = None, out_HWC: Pixels | None = None) -> Pixels:
    """Decode one encoded image (JPEG, PNG, TIFF, BMP or WebP, told apart by their first bytes).

    Args:
        data: the encoded bytes.
        expect: height and width that the tile must have; None takes any.
        out_HWC: C-contiguous buffer that is filled and returned, and whose size the tile must have. Its content is
            undefined after an error.

    Returns:
        RGB pixels, uint8, shape (H, W, 3), C-contiguous, writable, owned by the caller.

    Raises:
        BadSample: the bytes do not decode, the size is not ``expect``, or H * W is above ``MAX_PIXELS`` (this is
            read in the header, before any pixel is decoded).
    """
    if out_HWC is not None:
        expect = (out_HWC.shape[0], out_HWC.shape[1])
    if data[:2] == b"\xff\xd8" and (size := _jpeg_size(data)) is not None:
        _check_size(size, expect)
        out_HWC = np.empty((*size, 3), np.uint8) if out_HWC is None else out_HWC
        _jpeg_into(data, out_HWC)
        return out_HWC
    pixels = _plain_tiff(data, expect) if data[:4] in (b"II*\0", b"MM\0*") else None
    if pixels is None:
        pixels = _pillow(data, expect)
    if out_HWC is None:
        return np.require(pixels, requirements=["C", "W", "O"])  # the plain TIFF's pixels are a view of ``data``
    out_HWC[...] = pixels
    return out_HWC


def measure(data: bytes, *, whole: bool) -> tuple[int, int] | None:
    """Height and width of a JPEG or an uncompressed TIFF.

    Args:
        data: the encoded bytes.
        whole: also find out that ``decode`` takes the image. A JPEG is decoded for that to grey at an eighth of its
            sides: every coefficient is read, which is where damage shows, and most of the arithmetic is left out.

    Returns:
        None for every image that ``decode`` leaves to Pillow.

    Raises:
        BadSample: as ``decode``.
    """
    if data[:2] == b"\xff\xd8" and (found := _jpeg_header(data)) is not None:
        size, sampling = found
        _check_size(size, None)
        if whole and not _reads_coefficients(data, sampling):
            _jpeg_into(data, np.empty((*size, 3), np.uint8))
        return size
    pixels = _plain_tiff(data, None) if data[:4] in (b"II*\0", b"MM\0*") else None
    return None if pixels is None else (pixels.shape[0], pixels.shape[1])


def _check_size(size: tuple[int, int], expect: tuple[int, int] | None) -> None:
    height, width = size
    if height * width > MAX_PIXELS:
        raise BadSample(f"{height} x {width} pixels are above the limit of {MAX_PIXELS}")
    if height < 1 or width < 1:
        raise BadSample(f"{height} x {width} pixels are none")
    if expect is not None and size != tuple(expect):
        raise BadSample(f"{height} x {width} pixels, expected {expect[0]} x {expect[1]}")


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG; None for CMYK, which is left to Pillow."""
    found = _jpeg_header(data)
    return found[0] if found is not None else None


def _jpeg_header(data: bytes) -> tuple[tuple[int, int], str] | None:
    """Height and width of a JPEG, and its subsampling; None for CMYK, which is left to Pillow."""
    try:
        height, width, colours, sampling = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise BadSample(f"JPEG header does not decode: {_one_line(error)}") from None
    return None if colours in ("CMYK", "YCCK") else ((height, width), sampling)


def _reads_coefficients(data: bytes, sampling: str) -> bool:
    """True if a JPEG decodes to grey at an eighth of its sides without a warning.

    A subsampling that libjpeg-turbo cannot upsample would pass, for it matters to colour alone.
    """
    if sampling not in _SAMPLINGS:
        return False
    try:
        simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, min_factor=_MOST_REDUCED)
    except ValueError:
        return False
    return True


def _jpeg_into(data: bytes, out_HWC: Pixels) -> None:
    try:
        simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, buffer=out_HWC)
    except ValueError as error:
        raise BadSample(f"JPEG does not decode: {_one_line(error)}") from None


def _plain_tiff(data: bytes, expect: tuple[int, int] | None) -> Pixels | None:
    """Pixels of an uncompressed chunky 8-bit RGB TIFF as a view of ``data`` (a copy if its strips lie apart).

    None for every other TIFF, damaged ones too: Pillow then decodes it or raises. Source: TIFF 6.0,
    sections 2, 6 and 8.
    """
    try:
        tags = _tiff_tags(data)
        width, height = tags[256][0], tags[257][0]
        offsets, counts = tags[273], tags[279]
    except (struct.error, KeyError, IndexError):
        return None
    if not _is_plain_rgb(tags):
        return None
    _check_size((height, width), expect)
    row = 3 * width
    rows_per_strip = min(tags.get(278, (height,))[0], height)
    if rows_per_strip < 1 or len(offsets) != len(counts) or len(offsets) != -(-height // rows_per_strip):
        return None
    heights = [min(rows_per_strip, height - i * rows_per_strip) for i in range(len(offsets))]
    spans = [(start, rows * row) for start, rows in zip(offsets, heights, strict=True)]
    for (start, length), count in zip(spans, counts, strict=True):
        if count < length or start + length > len(data):
            return None
    if all(a + n == b for (a, n), (b, _) in zip(spans, spans[1:], strict=False)):
        flat = np.frombuffer(data, np.uint8, height * row, spans[0][0])
    else:
        flat = np.concatenate([np.frombuffer(data, np.uint8, length, start) for start, length in spans])
    return flat.reshape(height, width, 3)


def _is_plain_rgb(tags: dict[int, tuple[int, ...]]) -> bool:
    """True for tags of an uncompressed RGB image of three 8-bit unsigned chunky samples, in strips."""
    return (
        tags.get(258) == (8, 8, 8)
        and tags.get(259, (1,)) == (1,)
        and tags.get(262) == (2,)
        and tags.get(266, (1,)) == (1,)
        and tags.get(277) == (3,)
        and tags.get(284, (1,)) == (1,)
        and set(tags.get(339, (1,))) == {1}
        and 322 not in tags
    )


_TAGS = frozenset({256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 322, 339})


def _tiff_tags(data: bytes) -> dict[int, tuple[int, ...]]:
    """Values of the integer tags in ``_TAGS`` of the first image file directory.

    Raises:
        struct.error, KeyError: the directory or a value lies outside of ``data`` or is of no integer type.
    """
    order = "<" if data[:2] == b"II" else ">"
    (start,) = struct.unpack_from(order + "I", data, 4)
    (entries,) = struct.unpack_from(order + "H", data, start)
    tags: dict[int, tuple[int, ...]] = {}
    for i in range(entries):
        at = start + 2 + 12 * i
        tag, kind, count = struct.unpack_from(order + "HHI", data, at)
        if tag not in _TAGS:
            continue
        code, size = {1: ("B", 1), 3: ("H", 2), 4: ("I", 4)}[kind]
        if not 0 < count * size <= len(data):
            raise struct.error("no values, or values outside of the file")
        # Values of up to four bytes stand in the entry itself, longer ones where it points.
        place = at + 8 if count * size <= 4 else struct.unpack_from(order + "I", data, at + 8)[0]
        tags[tag] = struct.unpack_from(f"{order}{count}{code}", data, place)
    return tags


def _pillow(data: bytes, expect: tuple[int, int] | None) -> Pixels:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check_size(stored_size(image), expect)
            if image.mode in _WIDE_MODES:
                raise BadSample(f"{image.mode} pixels of more than 8 bits; convert the tile to 8-bit RGB")
            return np.array(as_stored(image).convert("RGB"), np.uint8)
    except BadSample:
        raise
    except UnidentifiedImageError:  # its own text names an object's address
        raise BadSample(f"does not decode: not a whole {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]} image") from None
    except (*PILLOW_ERRORS, Image.DecompressionBombError) as error:
        raise BadSample(f"does not decode: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
