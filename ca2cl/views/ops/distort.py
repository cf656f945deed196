"""Optical, grid and elastic distortion as coordinate maps.

A map gives, for each pixel of a view, the place in the tile that it is read from.

Coordinates x and y are float32 (B, S, S) as in ``geometry``; parameters float64, one row a sample.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ca2cl.views.ops.geometry import Affine, move
from ca2cl.views.ops.random import Draws
from ca2cl.views.ops.subset import per_sample

Planes = tuple[Tensor, Tensor]

GRID_STEPS = 5
# Pixels of a 224-pixel image, the size that the settings are meant for; other sizes are distorted in proportion.
_SIDE = 224
ELASTIC_ALPHA, ELASTIC_SIGMA, ELASTIC_JITTER = 3.0 / _SIDE, 50.0 / _SIDE, 50.0 / _SIDE
_WAVES = 4


def optical(x: Tensor, y: Tensor, k: Tensor) -> Planes:
    """Radial lens distortion: r → r (1 + k r² + k r⁴), r in sides of the image from its centre; k (B,)."""
    r2 = (x * x + y * y).mul_(0.25)
    factor = (r2 * r2).add_(r2).mul_(per_sample(k, x)).add_(1.0)
    return x * factor, y * factor


def grid(x: Tensor, y: Tensor, steps_x: Tensor, steps_y: Tensor) -> Planes:
    """Columns and rows of equal cells, each stretched by its own factor, from the top left corner on.

    Args:
        x: as above.
        y: as above.
        steps_x: factors of the columns, (B, steps), 1 leaves a column's width.
        steps_y: factors of the rows.
    """

    def stretch(at: Tensor, steps: Tensor) -> Tensor:
        width = 2.0 / steps.shape[1]
        out = torch.full_like(at, -1.0)
        for cell in range(steps.shape[1]):
            inside = (at + (1.0 - cell * width)).clamp_(0.0, width)
            out.add_(inside.mul_(per_sample(steps[:, cell], at)))
        return out

    return stretch(x, steps_x), stretch(y, steps_y)


def three_points(moves: Tensor) -> Affine:
    """The affine map that moves three corners of the middle square (of 2/3 of the side) by ``moves``.

    Args:
        moves: float64 (B, 3, 2), moves in x and y of the corners bottom right, top right and top left.
    """
    half = 2.0 / 3.0
    right_low, right_high, left_high = (moves[:, i] for i in range(3))
    by_y = (right_low - right_high) / (2.0 * half)
    by_x = (right_high - left_high) / (2.0 * half)
    shift = (right_low + left_high) * 0.5
    return Affine(1.0 + by_x[:, 0], by_y[:, 0], shift[:, 0], by_x[:, 1], 1.0 + by_y[:, 1], shift[:, 1])


def smooth_field(x: Tensor, y: Tensor, waves: Tensor, phases: Tensor) -> Tensor:
    """A random field of unit variance as a sum of plane waves: what white noise is after a Gaussian filter.

    Args:
        x: where, float32 (B, S, S).
        y: the same.
        waves: float64 (B, M, 2), wave vectors; normal ones of deviation 1 / (√2 σ) give correlation exp(-d² / 4σ²).
        phases: float64 (B, M) in [0, 2π).
    """
    total = torch.zeros_like(x)
    for m in range(waves.shape[1]):
        angle = x * per_sample(waves[:, m, 0], x) + y * per_sample(waves[:, m, 1], x)
        total.add_(angle.add_(per_sample(phases[:, m], x)).cos_())
    return total.mul_(math.sqrt(2.0 / waves.shape[1]))


def elastic(x: Tensor, y: Tensor, moves: Tensor, waves: Tensor, phases: Tensor) -> Planes:
    """An affine map by three moved points, then α times uniform noise smoothed by a Gaussian of deviation σ.

    After a filter as wide as σ = 50 the noise moves a pixel by about .01: it is the affine part that one sees.

    Args:
        x: as above.
        y: as above.
        moves: (B, 3, 2), see ``three_points``.
        waves: (B, 2, M, 2), see ``smooth_field``, for x and for y.
        phases: (B, 2, M).
    """
    # White noise on the pixels, uniform on [-1, 1], leaves the filter with this deviation; sides are 2 units long.
    deviation = 2.0 * ELASTIC_ALPHA / math.sqrt(3.0) / (2.0 * math.sqrt(math.pi) * ELASTIC_SIGMA * _SIDE)
    dx, dy = (smooth_field(x, y, waves[:, i], phases[:, i]).mul_(deviation) for i in range(2))
    moved_x, moved_y = move(x, y, three_points(moves))
    return moved_x.add_(dx), moved_y.add_(dy)


def draw_optical(draws: Draws) -> Tensor:
    """k of ``optical``, uniform on [-1, 1)."""
    return draws.uniform("optical", -1.0, 1.0)


def draw_grid(draws: Draws) -> Planes:
    """Steps of ``grid``, uniform on [0, 2)."""
    steps_x, steps_y = (
        torch.stack([draws.uniform(f"grid.{axis}.{i}", 0.0, 2.0) for i in range(GRID_STEPS)], dim=-1) for axis in "xy"
    )
    return steps_x, steps_y


def draw_elastic(draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    """Moves, waves and phases of ``elastic``."""
    reach = 2.0 * ELASTIC_JITTER
    moves = [draws.uniform(f"elastic.move.{i}", -reach, reach) for i in range(6)]
    # Box and Muller's pair of normal numbers is a wave vector: a Rayleigh length and a direction.
    deviation = 1.0 / (math.sqrt(2.0) * 2.0 * ELASTIC_SIGMA)
    waves, phases = [], []
    for i in range(2 * _WAVES):
        length = torch.sqrt(-2.0 * torch.log1p(-draws.uniform(f"elastic.length.{i}"))) * deviation
        direction = draws.uniform(f"elastic.direction.{i}", 0.0, 2.0 * math.pi)
        waves.append(torch.stack((length * torch.cos(direction), length * torch.sin(direction)), dim=-1))
        phases.append(draws.uniform(f"elastic.phase.{i}", 0.0, 2.0 * math.pi))
    return (
        torch.stack(moves, dim=-1).view(-1, 3, 2),
        torch.stack(waves, dim=1).view(-1, 2, _WAVES, 2),
        torch.stack(phases, dim=1).view(-1, 2, _WAVES),
    )
