"""Contrast-limited adaptive histogram equalisation (CLAHE) of lightness.

Zuiderveld, 1994; L of CIE L*a*b*.

a and b stay, so in f(X), f(Y), f(Z) of the definition of L*a*b* a change of L is one and the same summand for all
three: neither a nor b is ever computed. The curves in between are read off tables, each scaled to be the next one's
places, so that hardly a pass is spent on scaling.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ca2cl.views.ops.lookup import ENTRIES, look_up, table_of
from ca2cl.views.ops.subset import per_sample

TILES = 8
BINS = 256
# Linear sRGB to XYZ of the D65 white point, each row divided by the white point's coordinate (IEC 61966-2-1).
RGB_TO_XYZ = (
    (0.412453 / 0.950456, 0.357580 / 0.950456, 0.180423 / 0.950456),
    (0.212671, 0.715160, 0.072169),
    (0.019334 / 1.088754, 0.119193 / 1.088754, 0.950227 / 1.088754),
)
_CUBE_FROM = 216.0 / 24389.0
_SLOPE = 24389.0 / 27.0 / 116.0
# f of a saturated colour may pass 1 when its lightness rises; here the table ends.
_HIGHEST = 1.5
_LEVEL = 1.0 / (255.0 * 1.16)  # what one of 255 levels of lightness is in f


def linearise(images: Tensor) -> Tensor:
    """sRGB values to linear light, both in [0, 1]."""
    return torch.where(images <= 0.04045, images / 12.92, ((images + 0.055) / 1.055) ** 2.4)


def delinearise(light: Tensor) -> Tensor:
    """Linear light to sRGB values, both in [0, 1]."""
    return torch.where(light <= 0.0031308, light * 12.92, light ** (1.0 / 2.4) * 1.055 - 0.055)


def to_f(xyz: Tensor) -> Tensor:
    """f of the definition of L*a*b*: a cube root, straight near black."""
    return torch.where(xyz > _CUBE_FROM, xyz ** (1.0 / 3.0), xyz * _SLOPE + 16.0 / 116.0)


def from_f(f: Tensor) -> Tensor:
    """The inverse of ``to_f``."""
    return torch.where(f > 6.0 / 29.0, f * f * f, (f - 16.0 / 116.0) / _SLOPE)


def _to_f_places(xyz: Tensor) -> Tensor:
    return to_f(xyz) * (ENTRIES / _HIGHEST)


def _from_f_places(share: Tensor) -> Tensor:
    return from_f(share * _HIGHEST)


def _to_level(y: Tensor) -> Tensor:
    """Lightness of a luminance as one of 0 … 255."""
    return ((to_f(y) * 1.16 - 0.16) * 255.0).round().clamp(0, 255)


@lru_cache
def _matrices(device: torch.device) -> tuple[Tensor, Tensor]:
    """Linear RGB to XYZ and back, scaled to places in a table; float32 (1, 3, 3)."""
    matrix = torch.tensor(RGB_TO_XYZ, dtype=torch.float64)
    forward, back = ((m * ENTRIES).float().to(device)[None] for m in (matrix, torch.linalg.inv(matrix)))
    return forward, back


def _mix_channels(images: Tensor, matrix: Tensor) -> Tensor:
    return torch.bmm(matrix.expand(len(images), 3, 3), images.flatten(2)).view_as(images)


def clahe_lightness(images: Tensor, clip: Tensor) -> Tensor:
    """Equalise the lightness of RGB images, their a and b kept.

    Args:
        images: float32 (B, 3, H, W) in [0, 1].
        clip: float64 (B,), the highest a histogram's bin may be, in multiples of its mean.

    Returns:
        float32 (B, 3, H, W) in [0, 1].
    """
    device = images.device
    forward, back = _matrices(device)
    xyz = _mix_channels(look_up(table_of(linearise, device), images * ENTRIES), forward)
    levels = look_up(table_of(_to_level, device, torch.int32), xyz[:, 1])
    change = equalise(levels, clip).sub_(levels).mul_(_LEVEL * ENTRIES / _HIGHEST)
    f = look_up(table_of(_to_f_places, device), xyz).add_(change[:, None]).clamp_(0.0, ENTRIES)
    light = _mix_channels(look_up(table_of(_from_f_places, device), f), back).clamp_(0.0, ENTRIES)
    return look_up(table_of(delinearise, device), light)


def equalise(levels: Tensor, clip: Tensor) -> Tensor:
    """CLAHE of one plane: a look-up table for each of 8 × 8 tiles, interpolated between their centres.

    Args:
        levels: int32 (B, H, W) in 0 … 255.
        clip: float64 (B,).

    Returns:
        float32 (B, H, W) in [0, 255].
    """
    height, width = levels.shape[-2:]
    below, right = -height % TILES, -width % TILES
    padded = levels
    if below or right:
        padded = F.pad(levels.float()[:, None], (0, right, 0, below), mode="reflect")[:, 0].int()
    return interpolate_tables(levels, look_up_tables(padded, clip))


def look_up_tables(levels: Tensor, clip: Tensor) -> Tensor:
    """The scaled cumulative histograms, clipped: float32 (B, TILES, TILES, BINS) in [0, 255].

    Args:
        levels: int32 (B, H, W), H and W multiples of TILES.
        clip: float64 (B,).
    """
    count, height, width = levels.shape
    cells = levels.view(count, TILES, height // TILES, TILES, width // TILES)
    offsets = torch.arange(count * TILES * TILES, device=levels.device).view(count, TILES, 1, TILES, 1) * BINS
    histogram = torch.zeros(count * TILES * TILES * BINS, device=levels.device)
    places = (cells + offsets).flatten()
    histogram.scatter_add_(0, places, histogram.new_ones(1).expand(len(places)))
    histogram = histogram.view(count, TILES, TILES, BINS)
    area = (height // TILES) * (width // TILES)
    limit = per_sample((clip * (area / BINS)).floor().clamp(min=1.0), histogram)
    clipped = torch.minimum(histogram, limit)
    # What was cut off is spread evenly. All numbers are whole but for that share, so any order sums alike.
    excess = (histogram - clipped).sum(-1, keepdim=True) / BINS
    return (clipped + excess).cumsum(-1).mul_(255.0 / area).clamp_(max=255.0)


@lru_cache
def _corners(height: int, width: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """For each of the four nearest tiles: where its table starts, int32 (H, W), and its weight, float32 (H, W)."""

    def neighbours(size: int) -> list[tuple[Tensor, Tensor]]:
        at = (torch.arange(size, dtype=torch.float64) + 0.5) / (-(-size // TILES)) - 0.5
        low, above = at.floor().int(), at - at.floor()
        return [(low.clamp(min=0), 1.0 - above), ((low + 1).clamp(max=TILES - 1), above)]

    return [
        (
            ((row[:, None] * TILES + column) * BINS).to(device),
            (down[:, None] * across).float().to(device),
        )
        for row, down in neighbours(height)
        for column, across in neighbours(width)
    ]


def interpolate_tables(levels: Tensor, tables: Tensor) -> Tensor:
    """Every pixel's level through the tables of the four nearest tiles, weighted bilinearly."""
    count, height, width = levels.shape
    flat = tables.flatten()
    starts = torch.arange(count, device=levels.device, dtype=torch.int32) * (TILES * TILES * BINS)
    places = levels + starts[:, None, None]
    total = torch.zeros(levels.shape, device=levels.device)
    for start, weight in _corners(height, width, levels.device):
        total.add_(flat.index_select(0, (places + start).flatten()).view(levels.shape).mul_(weight))
    return total
