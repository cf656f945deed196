"""Affine and non-linear geometry, composed into one sampling grid.

Coordinates are torch's: x to the right and y down, -1 and 1 the outer edges of the image (align_corners=False), so a
map neither knows the tile's size nor the view's. Maps run backwards, from the view to the tile. Sums and products are
separate operations on purpose: fused ones round differently in a vector's body and its tail, and a sample's view must
not depend on where in the batch it lies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ca2cl.runtime.device import to_device
from ca2cl.views.ops.subset import per_sample


@dataclass(frozen=True)
class Affine:
    """x' = a x + b y + c and y' = d x + e y + f; every coefficient float64 (B,)."""

    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    e: Tensor
    f: Tensor

    @classmethod
    def identity(cls, like: Tensor) -> Affine:
        """The map that changes nothing, for as many samples as ``like`` has."""
        one, zero = torch.ones_like(like), torch.zeros_like(like)
        return cls(one, zero, zero, zero, one, zero)

    def then(self, next_: Affine) -> Affine:
        """The map that applies this one first and ``next_`` to its result."""
        n = next_
        return Affine(
            n.a * self.a + n.b * self.d,
            n.a * self.b + n.b * self.e,
            n.a * self.c + n.b * self.f + n.c,
            n.d * self.a + n.e * self.d,
            n.d * self.b + n.e * self.e,
            n.d * self.c + n.e * self.f + n.f,
        )

    def rows(self, index: Tensor | slice) -> Affine:
        """The maps of some samples."""
        return Affine(*(getattr(self, name)[index] for name in "abcdef"))


def dihedral(transpose: Tensor, vertical: Tensor, horizontal: Tensor) -> Affine:
    """Transpose, then flip top to bottom, then left to right, where the bool (B,) masks say so."""
    swap, keep = transpose.double(), (~transpose).double()
    sign_x, sign_y = 1.0 - 2.0 * horizontal.double(), 1.0 - 2.0 * vertical.double()
    zero = torch.zeros_like(swap)
    return Affine(keep * sign_x, swap * sign_y, zero, swap * sign_x, keep * sign_y, zero)


def shift_scale_rotate(shift_x: Tensor, shift_y: Tensor, scale: Tensor, degrees: Tensor) -> Affine:
    """The inverse of: turn counter-clockwise about the centre, scale, then shift by a share of the side.

    Args:
        shift_x: to the right, in sides, (B,).
        shift_y: down, in sides, (B,).
        scale: factor, (B,).
        degrees: counter-clockwise, (B,).
    """
    angle = degrees * (math.pi / 180.0)
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    back = Affine.identity(scale)
    zero = torch.zeros_like(scale)
    move = Affine(back.a, zero, -2.0 * shift_x, zero, back.e, -2.0 * shift_y)
    return move.then(Affine(cos, -sin, zero, sin, cos, zero))


def crop(left: Tensor, top: Tensor, width: Tensor, height: Tensor) -> Affine:
    """A view that covers a window of the tile; all four in shares of the tile's side.

    Args:
        left: edge of the window, (B,).
        top: likewise.
        width: of the window, (B,).
        height: likewise.
    """
    zero = torch.zeros_like(left)
    return Affine(width, zero, 2.0 * left + width - 1.0, zero, height, 2.0 * top + height - 1.0)


def pixel_centres(size: int) -> Tensor:
    """Coordinates of the centres of ``size`` pixels, float64 (size,)."""
    return (torch.arange(size, dtype=torch.float64) * 2.0 + (1.0 - size)) / size


def affine_grid(affine: Affine, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Source coordinates x and y of every pixel of a view, each float32 (B, size, size) on ``device``."""
    centre = pixel_centres(size)

    def plane(by_x: Tensor, by_y: Tensor, constant: Tensor) -> Tensor:
        row = to_device((by_x[:, None] * centre + constant[:, None]).float(), device)
        column = to_device((by_y[:, None] * centre).float(), device)
        return column[:, :, None] + row[:, None, :]

    return plane(affine.a, affine.b, affine.c), plane(affine.d, affine.e, affine.f)


def move(x: Tensor, y: Tensor, affine: Affine) -> tuple[Tensor, Tensor]:
    """Coordinates, float32 (B, S, S), through one more map."""
    a, b, c, d, e, f = (per_sample(getattr(affine, name), x) for name in "abcdef")
    return (x * a).add_(y * b).add_(c), (x * d).add_(y * e).add_(f)


def coverage(x: Tensor, y: Tensor, size: int) -> Tensor:
    """Which share of a read pixel lies on an image of ``size`` pixels: what a zero border leaves of it.

    Times a reading that reflects at the border, this is exactly a reading with zeros around the image.

    Returns:
        float32 (B, S, S) in [0, 1].
    """
    across, down = ((at.abs() * (-size / 2.0)).add_((size + 1.0) / 2.0).clamp_(0.0, 1.0) for at in (x, y))
    return across.mul_(down)


def sample(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Bilinear interpolation, reflecting at the border.

    Args:
        images: float32 (B, C, H, W).
        x: float32 (B, S, S), source coordinates.
        y: the same.

    Returns:
        float32 (B, C, S, S).
    """
    grid = x.new_empty(*x.shape, 2)
    grid[..., 0], grid[..., 1] = x, y  # several times as fast as torch.stack
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def reduction(side: Tensor, size: int) -> Tensor:
    """By how much a window of ``side`` tile pixels is reduced before it becomes ``size`` view pixels.

    The whole number k = floor(side / size), at least 1: tiles are first averaged over k × k blocks, so that the
    bilinear step shrinks by less than 2 and does not alias; windows smaller than twice the view stay untouched.
    """
    return (side / size).floor().clamp(min=1).long()


def reduce_by(images: Tensor, factor: int) -> Tensor:
    """Area mean over blocks of about factor × factor pixels: float32 (B, C, H, W) → (B, C, ~H/factor, ~W/factor)."""
    if factor == 1:
        return images
    height, width = (max(1, round(side / factor)) for side in images.shape[-2:])
    if images.shape[-2] % factor == 0 and images.shape[-1] % factor == 0:
        return F.avg_pool2d(images, factor)
    return F.interpolate(images, (height, width), mode="area")


def sample_reduced(images: Tensor, factors: list[int], x: Tensor, y: Tensor) -> Tensor:
    """``sample`` with every tile first reduced by its own factor; tiles of one factor go together.

    Args:
        images: (B, C, H, W).
        factors: of each tile, whole numbers.
        x: where to read, as in ``sample``.
        y: likewise.
    """
    levels = sorted(set(factors))
    if len(levels) == 1:
        return sample(reduce_by(images, levels[0]), x, y)
    out = images.new_empty(len(images), images.shape[1], *x.shape[1:])
    for level in levels:
        of_level = torch.tensor([i for i, factor in enumerate(factors) if factor == level])
        rows = to_device(of_level, images.device)
        out[rows] = sample(reduce_by(images[rows], level), x[rows], y[rows])
    return out
