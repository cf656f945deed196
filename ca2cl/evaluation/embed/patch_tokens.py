"""Patch tokens: their grid, and a raw file for each part.

A part's tokens are little-endian numbers in the order tile, row, column, feature, without a header. They are written
batch by batch and copied into the result, so memory does not depend on the number of tiles.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ca2cl.common.files import replacing, writing
from ca2cl.errors import InputError

SUFFIX = ".tokens"
_BLOCK = 1 << 24  # bytes that are copied at a time
_CODES = {"float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class TokenGrid:
    """Shape and type of a tile's patch tokens.

    Attributes:
        height: rows of patches.
        width: patches in a row.
        dim: length of a token.
        dtype: float16 or float32.
        side: side of the encoder's input in pixels.
    """

    height: int
    width: int
    dim: int
    dtype: str
    side: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a tile's tokens."""
        return self.height, self.width, self.dim

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile's tokens."""
        return self.height * self.width * self.dim * np.dtype(self.dtype).itemsize

    @property
    def code(self) -> str:
        """Its type's name in a safetensors file."""
        return _CODES[self.dtype]

    def describe(self) -> dict[str, Any]:
        """For the result's metadata; sizes are in pixels of the encoder's input."""
        patch = [self.side / self.height, self.side / self.width]
        return {"grid": [self.height, self.width], "dim": self.dim, "dtype": self.dtype, "patch_size": patch,
                "image_size": self.side, "order": "tile, row, column, feature"}  # fmt: skip


@contextmanager
def token_writer(path: Path, remedy: str) -> Iterator[Callable[[npt.NDArray[Any] | None], None]]:
    """A function that appends tokens to a new file, which takes the place of ``path`` at the end.

    Args:
        path: of the file.
        remedy: how the line of a failure ends.
    """
    with ExitStack() as stack:
        with writing(path, remedy):
            file = stack.enter_context(replacing(path))

        def append(tokens_BhwD: npt.NDArray[Any] | None) -> None:
            assert tokens_BhwD is not None
            with writing(path, remedy):
                file.write(tokens_BhwD.astype(tokens_BhwD.dtype.newbyteorder("<"), copy=False).tobytes())

        yield append
        with writing(path, remedy):
            stack.close()


def copy_tokens(paths: Iterable[Path], out: BinaryIO) -> None:
    """Append the files of all parts to ``out``.

    Raises:
        InputError: one cannot be read any more.
    """
    for path in paths:
        try:
            file = path.open("rb")
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); remove it and run again") from None
        with file:
            shutil.copyfileobj(file, out, _BLOCK)
