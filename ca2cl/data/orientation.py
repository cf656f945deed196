"""EXIF orientation: pixels are taken as they are stored.

A camera or a viewer may note in a file that it is to be shown turned (EXIF or TIFF tag 274, XMP ``tiff:Orientation``).
That is ignored here: a tile has no way up, bytes are kept as they came, masks and COCO files refer to the stored
pixels, and libjpeg-turbo and the plain TIFF reader ignore it too. Where tiles are taken as they are, such files are
counted in a warning. Where annotations belong to them they are refused: the annotations may fit either way up, and
detectron2's own loader turns the image.
"""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ca2cl.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

TAG = 274
_BACK = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_90",
    7: "TRANSVERSE",
    8: "ROTATE_270",
}
"""Pillow's transposition that undoes what it does to a TIFF of that orientation."""
_ERRORS = (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError, AttributeError, OverflowError)
_UPRIGHT = "save it upright and without the tag (PIL.ImageOps.exif_transpose, mogrify -auto-orient)"


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Height and width as stored: Pillow gives a TIFF the size that it has once turned."""
    tags = getattr(image, "tag_v2", None)
    if tags is not None and image.format == "TIFF":
        height, width = tags.get(257), tags.get(256)
        if isinstance(height, int) and isinstance(width, int):
            return height, width
    return image.height, image.width


def as_stored(image: Image.Image) -> Image.Image:
    """An image that was just opened, its pixels loaded as they are stored: Pillow turns a TIFF as it loads it.

    Raises:
        OSError and others of ``decode.PILLOW_ERRORS``: it does not decode.
    """
    tags = getattr(image, "tag_v2", None)
    turned = tags.get(TAG) if tags is not None and image.format == "TIFF" else None
    image.load()
    if turned not in _BACK:
        return image
    from PIL import Image

    return image.transpose(Image.Transpose[_BACK[turned]])


def orientation_of(data: bytes) -> int:
    """Orientation in which an encoded image is to be shown: 1 as stored, also where it has none; 2 to 8 turned."""
    try:
        if not _may_say(data):
            return 1
    except (*_ERRORS, struct.error):
        return 1  # it does not decode, and decoding it reports that
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of damaged tags
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "TIFF", "WEBP")) as image:
                found = image.getexif().get(TAG, 1)
    except (*_ERRORS, struct.error, Image.DecompressionBombError):
        return 1
    return found if isinstance(found, int) and found in _BACK else 1


def refuse_turned(path: Path, orientation: int) -> None:
    """Refuse an annotated image that is noted to be shown turned.

    Raises:
        InputError: it is.
    """
    if orientation != 1:
        raise InputError(
            f"{path}: says that it is to be shown turned (EXIF orientation {orientation}), and its annotations may be "
            f"of either way up; {_UPRIGHT} as they are"
        )


def _may_say(data: bytes) -> bool:
    """True if an image may have an orientation. Most have no place for one, and opening an image with Pillow takes as
    long as decoding a small one.

    Raises:
        struct.error, IndexError: it is cut off.
    """
    if data[:2] == b"\xff\xd8":
        at = 2
        while data[at] == 0xFF and data[at + 1] != 0xDA:  # segments up to the start of the scan; APP1 has EXIF and XMP
            if data[at + 1] == 0xE1:
                return True
            at += 2 + int(struct.unpack_from(">H", data, at + 2)[0])
        return False
    if data[:4] == b"\x89PNG":
        return _has_chunk(data, 8, ">I4s", (b"eXIf", b"iTXt", b"tEXt", b"zTXt"), 12)
    if data[:4] == b"RIFF":
        return _has_chunk(data, 12, "<4sI", (b"EXIF", b"XMP "), 8)
    return data[:4] in (b"II*\0", b"MM\0*") and _has_tag(data)


def _has_chunk(data: bytes, at: int, head: str, names: tuple[bytes, ...], around: int) -> bool:
    """``around``: bytes of a chunk beside its content, which begins at an even place in RIFF."""
    while at + 8 <= len(data):
        fields = struct.unpack_from(head, data, at)
        name, length = (fields[1], fields[0]) if isinstance(fields[0], int) else fields
        if name in names:
            return True
        at += around + length + (length % 2 if around == 8 else 0)
    return False


def _has_tag(data: bytes) -> bool:
    """True if a TIFF's first directory has an orientation other than 1, or XMP."""
    order = "<" if data[:2] == b"II" else ">"
    (start,) = struct.unpack_from(order + "I", data, 4)
    (entries,) = struct.unpack_from(order + "H", data, start)
    for at in range(start + 2, start + 2 + 12 * entries, 12):
        tag, _, _, value = struct.unpack_from(order + "HHIH", data, at)
        if tag == 700 or (tag == TAG and value != 1):
            return True
    return False
