"""Contrast-limited adaptive histogram equalisation (Zuiderveld, 1994) of the lightness L of CIE L*a*b*.

a and b stay, so in f(X), f(Y), f(Z) of the definition of L*a*b* a change of L is one and the same summand for all
three: neither a nor b is ever computed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ca2cl.views.curves import read_curve
from ca2cl.views.subset import per_sample

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
# f of a saturated colour may pass 1 when its lightness rises; from there on it is read as the last entry.
_HIGHEST = 1.5


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


def _mix_channels(images: Tensor, matrix: Tensor) -> Tensor:
    flat = images.flatten(2)
    return torch.bmm(matrix.expand(len(images), 3, 3), flat).view_as(images)


def clahe_lightness(images: Tensor, clip: Tensor) -> Tensor:
    """Equalise the lightness of RGB images, their a and b kept.

    Args:
        images: float32 (B, 3, H, W) in [0, 1].
        clip: float64 (B,), the highest a histogram's bin may be, in multiples of its mean.

    Returns:
        float32 (B, 3, H, W) in [0, 1].
    """
    matrix = torch.tensor(RGB_TO_XYZ, dtype=torch.float64)
    forward, back = matrix.float().to(images.device), torch.linalg.inv(matrix).float().to(images.device)
    f = read_curve(_mix_channels(read_curve(images, linearise), forward), to_f)
    levels = (f[:, 1] * (1.16 * 255.0)).sub_(0.16 * 255.0 - 0.5).floor_().clamp_(0.0, 255.0)
    change = (equalise(levels, clip) - levels).mul_(1.0 / (255.0 * 1.16))
    light = read_curve(f.add_(change[:, None]), from_f, high=_HIGHEST)
    return read_curve(_mix_channels(light, back), delinearise)


def equalise(levels: Tensor, clip: Tensor) -> Tensor:
    """CLAHE of one plane: a look-up table for each of 8 × 8 tiles, interpolated between their centres.

    Args:
        levels: float32 (B, H, W), whole numbers in 0 … 255.
        clip: float64 (B,).

    Returns:
        float32 (B, H, W) in [0, 255].
    """
    height, width = levels.shape[-2:]
    below, right = -height % TILES, -width % TILES
    padded = levels
    if below or right:
        padded = F.pad(levels[:, None], (0, right, 0, below), mode="reflect")[:, 0]
    tables = look_up_tables(padded.long(), clip)
    return interpolate_tables(levels.long(), tables, padded.shape[-2] // TILES, padded.shape[-1] // TILES)


def look_up_tables(levels: Tensor, clip: Tensor) -> Tensor:
    """The scaled cumulative histograms, clipped: float32 (B, TILES, TILES, BINS) in [0, 255]."""
    count, height, width = levels.shape
    cells = levels.view(count, TILES, height // TILES, TILES, width // TILES)
    offsets = torch.arange(count * TILES * TILES, device=levels.device).view(count, TILES, 1, TILES, 1) * BINS
    flat = (cells + offsets).flatten()
    histogram = torch.bincount(flat, minlength=count * TILES * TILES * BINS).view(count, TILES, TILES, BINS).float()
    area = (height // TILES) * (width // TILES)
    limit = per_sample((clip * (area / BINS)).floor().clamp(min=1.0), histogram)
    clipped = torch.minimum(histogram, limit)
    # What was cut off is spread evenly. All numbers are whole but for that share, so any order sums alike.
    excess = (histogram - clipped).sum(-1, keepdim=True) / BINS
    return (clipped + excess).cumsum(-1).mul_(255.0 / area).clamp_(max=255.0)


def interpolate_tables(levels: Tensor, tables: Tensor, cell_height: int, cell_width: int) -> Tensor:
    """Every pixel's level through the tables of the four nearest tiles, weighted bilinearly."""

    def neighbours(size: int, cell: int) -> tuple[Tensor, Tensor, Tensor]:
        at = (torch.arange(size, device=levels.device) + 0.5) / cell - 0.5
        low = at.floor()
        return low.long().clamp(0, TILES - 1), (low.long() + 1).clamp(0, TILES - 1), at - low

    count, height, width = levels.shape
    top, bottom, down = neighbours(height, cell_height)
    left, right, across = neighbours(width, cell_width)
    flat = tables.flatten()
    base = levels + torch.arange(count, device=levels.device)[:, None, None] * (TILES * TILES * BINS)

    def through(row: Tensor, column: Tensor) -> Tensor:
        return flat[base + ((row * TILES)[:, None] + column) * BINS]

    upper = torch.lerp(through(top, left), through(top, right), across)
    lower = torch.lerp(through(bottom, left), through(bottom, right), across)
    return torch.lerp(upper, lower, down[:, None])
