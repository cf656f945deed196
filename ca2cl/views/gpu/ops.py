"""Triton kernels as torch operators, one launch each.

Each operator also knows the shape of its result, for tensors without data.

``rows`` are float32 (B, columns) of ``draw.table``, ``constants`` float32: what levels become (3 x 256), then
``draw.lightness``; images are uint8 (B, S, S, 3). Triton is imported by the first launch: tensors that have a shape
alone need none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

BLOCK = 512  # pixels of a program
_CELL_BLOCK = 1024


def _kernels() -> Any:
    from ca2cl.views.gpu import kernels

    return kernels


def _blocks(size: int) -> int:
    return -(-size * size // BLOCK)


def _empty(like: Tensor, size: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return like.new_empty((len(like), size, size, 3), dtype=dtype)


@custom_op("ca2cl::views_read", mutates_args=())
def read(tiles: Tensor, rows: Tensor, size: int, stains: bool) -> tuple[Tensor, Tensor]:
    """Geometry, brightness and contrast; with ``stains`` these, too, and sums of channels, int32 (B, blocks, 3)."""
    out, sums = _empty(tiles, size), tiles.new_empty((len(tiles), _blocks(size), 3), dtype=torch.int32)
    height, width = tiles.shape[1:3]
    _kernels().read_kernel[len(tiles), _blocks(size)](
        tiles, rows, out, sums, height, width, size, BLOCK=BLOCK, STAINS=stains
    )
    return out, sums


@read.register_fake
def _(tiles: Tensor, rows: Tensor, size: int, stains: bool) -> tuple[Tensor, Tensor]:
    return _empty(tiles, size), tiles.new_empty((len(tiles), _blocks(size), 3), dtype=torch.int32)


@custom_op("ca2cl::views_weak", mutates_args=())
def weak(tiles: Tensor, rows: Tensor, constants: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """A view without neighbours, from the tile to the encoder's numbers."""
    out = _empty(tiles, size, dtype)
    height, width = tiles.shape[1:3]
    _kernels().weak_kernel[len(tiles), _blocks(size)](tiles, rows, constants, out, height, width, size, BLOCK=BLOCK)
    return out


@weak.register_fake
def _(tiles: Tensor, rows: Tensor, constants: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    return _empty(tiles, size, dtype)


@custom_op("ca2cl::views_across", mutates_args=())
def across(images: Tensor, rows: Tensor, sums: Tensor, coloured: bool) -> Tensor:
    """A Gaussian blur along the rows; where ``coloured``, of the images in their new colours."""
    out, size, blocks = torch.empty_like(images), images.shape[1], sums.shape[1]
    _kernels().across_kernel[len(images), _blocks(size)](
        images, rows, sums, out, size, blocks, BLOCK=BLOCK, BLOCKS=1 << (blocks - 1).bit_length(), COLOURS=coloured
    )
    return out


@across.register_fake
def _(images: Tensor, rows: Tensor, sums: Tensor, coloured: bool) -> Tensor:
    return torch.empty_like(images)


@custom_op("ca2cl::views_near", mutates_args=())
def near(images: Tensor, rows: Tensor) -> Tensor:
    """A Gaussian blur along the columns, motion, median or noise."""
    out, size = torch.empty_like(images), images.shape[1]
    _kernels().near_kernel[len(images), _blocks(size)](images, rows, rows, out, size, BLOCK=BLOCK, GAUSSIAN_ONLY=False)
    return out


@near.register_fake
def _(images: Tensor, rows: Tensor) -> Tensor:
    return torch.empty_like(images)


@custom_op("ca2cl::views_down", mutates_args=())
def down(images: Tensor, rows: Tensor, constants: Tensor, dtype: torch.dtype) -> Tensor:
    """A Gaussian blur along the columns, finished."""
    size = images.shape[1]
    out = _empty(images, size, dtype)
    _kernels().near_kernel[len(images), _blocks(size)](
        images, rows, constants, out, size, BLOCK=BLOCK, GAUSSIAN_ONLY=True
    )
    return out


@down.register_fake
def _(images: Tensor, rows: Tensor, constants: Tensor, dtype: torch.dtype) -> Tensor:
    return _empty(images, images.shape[1], dtype)


@custom_op("ca2cl::views_tables", mutates_args=())
def tables(images: Tensor, rows: Tensor, constants: Tensor) -> Tensor:
    """CLAHE's tables of 8 x 8 cells, uint8 (B, 64, 256)."""
    size = images.shape[1]
    out = images.new_empty((len(images), 64, 256))
    _kernels().tables_kernel[len(images), 64](images, rows, constants, out, size, -(-size // 8), BLOCK=_CELL_BLOCK)
    return out


@tables.register_fake
def _(images: Tensor, rows: Tensor, constants: Tensor) -> Tensor:
    return images.new_empty((len(images), 64, 256))


@custom_op("ca2cl::views_finish", mutates_args=())
def finish(images: Tensor, rows: Tensor, equalisers: Tensor, constants: Tensor, dtype: torch.dtype) -> Tensor:
    """CLAHE by its tables, hue, saturation and value, frame and hole, the encoder's numbers."""
    size = images.shape[1]
    out = _empty(images, size, dtype)
    _kernels().finish_kernel[len(images), _blocks(size)](
        images, rows, equalisers, constants, out, size, -(-size // 8), BLOCK=BLOCK
    )
    return out


@finish.register_fake
def _(images: Tensor, rows: Tensor, equalisers: Tensor, constants: Tensor, dtype: torch.dtype) -> Tensor:
    return _empty(images, images.shape[1], dtype)
