"""Tar writer with the offset of each sample and a digest.

Headers carry no clock and no owner, so equal samples give equal bytes. They are those of ``tarfile.TarInfo`` in the PAX
format, which takes longer to make one than a tile's bytes take to be hashed.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Mapping
from typing import BinaryIO

_NAME_BYTES = 100
_LARGEST = 8**11 - 1
_DAMAGE = (tarfile.TarError, ValueError, TypeError, OverflowError)  # by what tarfile fails on damaged headers
_PAX_PATH = re.compile(rb"\d+ path=([^\n]*)\n")
_SIZE, _SIZE_END, _SUM, _SUM_END = 124, 136, 148, 155
"""Places of a header's size and of its checksum (POSIX.1-1988, ustar); the checksum's last byte is a space."""
_EMPTY = tarfile.TarInfo().tobuf(tarfile.PAX_FORMAT)
_BEFORE, _BETWEEN, _AFTER = _EMPTY[_NAME_BYTES:_SIZE], _EMPTY[_SIZE_END:_SUM], _EMPTY[_SUM_END:]
_REST_SUM = sum(_BEFORE + _BETWEEN + _AFTER + b" " * (_SUM_END - _SUM))


def header(name: str, size: int) -> bytes:
    """The header of a member: 512 bytes, or more for a name that is long or not ASCII, or 8 GiB."""
    if len(name) > _NAME_BYTES or size > _LARGEST or not name.isascii():
        member = tarfile.TarInfo(name)
        member.size = size
        return member.tobuf(tarfile.PAX_FORMAT)
    named, sized = name.encode("ascii"), b"%011o\0" % size
    checksum = _REST_SUM + sum(named) + sum(sized)  # of the header's bytes, its own being spaces
    fields = named.ljust(_NAME_BYTES, b"\0") + _BEFORE + sized + _BETWEEN
    return fields + b"%06o\0" % checksum + _AFTER


def find_member(blocks: bytes, key: str, ext: str) -> bytes | None:
    """Bytes of a sample's member ``key.ext``, or None if it has none.

    Args:
        blocks: a piece of a tar that begins with the header of one of the sample's members.
        key: the sample's.
        ext: of the member.
    """
    at, name = 0, ""
    try:
        while at < len(blocks):
            member = tarfile.TarInfo.frombuf(blocks[at : at + tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
            at += tarfile.BLOCKSIZE
            data = blocks[at : at + max(member.size, 0)]
            at += len(data) + -len(data) % tarfile.BLOCKSIZE
            if member.type == tarfile.XHDTYPE:  # the next member's name, which is long or not ASCII
                path = _PAX_PATH.search(data)
                name = path[1].decode() if path else ""
                continue
            name = name or member.name
            if not name.startswith(f"{key}."):
                return None
            if name == f"{key}.{ext}":
                return data if len(data) == member.size else None
            name = ""
    except _DAMAGE:
        pass
    return None


class TarWriter:
    """Writes samples one after another, and computes their offsets and the SHA-256 of all on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.length = 0

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self.sha256.update(data)
        self.length += len(data)

    def add(self, key: str, parts: Mapping[str, bytes]) -> int:
        """Add a sample: ``parts`` by extension, in order. Returns the offset of the first part's bytes in the tar."""
        blocks: list[bytes] = []
        for ext, data in parts.items():
            blocks += [header(f"{key}.{ext}", len(data)), data, bytes(-len(data) % tarfile.BLOCKSIZE)]
        offset = self.length + len(blocks[0])
        self._write(b"".join(blocks))
        return offset

    def close(self) -> None:
        """Write the end mark."""
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self.length + end) % tarfile.RECORDSIZE))
