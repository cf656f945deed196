"""Stain, scanner, compression and blur shifts of tiles.

Every shift is a function of the pixels alone. Stains are unmixed as optical densities (Ruifrok and Johnston, Anal.
Quant. Cytol. Histol. 2001); the table of shifts below is fixed, so that numbers of different encoders and versions
compare.

Legend: B tiles of H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
import torch.nn.functional as F
from torch import Tensor

STAINS = np.array(((0.650, 0.704, 0.286), (0.072, 0.990, 0.105), (0.268, 0.570, 0.776)))
"""Optical densities in red, green and blue of haematoxylin, eosin and a residual (Ruifrok and Johnston, 2001)."""


@dataclass(frozen=True)
class Shift:
    """A change of a tile at one of three strengths."""

    family: str
    strength: int
    """1 to 3."""
    setting: str
    """What was changed by how much."""
    apply: Callable[[Tensor], Tensor]
    """uint8 (B, H, W, 3) on any device → the same shape, type and device."""

    @property
    def name(self) -> str:
        """Family and strength."""
        return f"{self.family} {self.strength}"


def stain(haematoxylin: float, eosin: float) -> Callable[[Tensor], Tensor]:
    """Multiply the concentrations of the two stains.

    With densities d = -ln(max(v, 1) / 255) of a pixel and the stains' rows S, concentrations are c = d S^-1, and the
    new densities are c' S.
    """
    matrix = np.linalg.inv(STAINS) @ np.diag((haematoxylin, eosin, 1.0)) @ STAINS

    def apply(tiles_BHWC: Tensor) -> Tensor:
        density = -torch.log(torch.arange(256, dtype=torch.float32).clamp(min=1) / 255).to(tiles_BHWC.device)
        mixed = density[tiles_BHWC.int()] @ torch.from_numpy(matrix).float().to(tiles_BHWC.device)
        return _levels(255 * torch.exp(-mixed))

    return apply


def scanner(gamma: float, red: float, blue: float) -> Callable[[Tensor], Tensor]:
    """Raise brightness to a power, v' = 255 (v / 255)^gamma, then multiply red and blue."""
    level = np.arange(256) / 255
    table = np.stack([gain * level**gamma for gain in (red, 1.0, blue)])
    levels = torch.from_numpy((255 * table).round().clip(0, 255).astype(np.uint8))

    def apply(tiles_BHWC: Tensor) -> Tensor:
        channels = [levels[c].to(tiles_BHWC.device)[tiles_BHWC[..., c].int()] for c in range(3)]
        return torch.stack(channels, dim=-1)

    return apply


def jpeg(quality: int) -> Callable[[Tensor], Tensor]:
    """Encode as JPEG with halved colour resolution (4:2:0), and decode."""

    def apply(tiles_BHWC: Tensor) -> Tensor:
        host: npt.NDArray[np.uint8] = tiles_BHWC.cpu().contiguous().numpy()
        decoded = [simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(tile, quality, "RGB", "420"), "RGB") for tile in host]
        return torch.from_numpy(np.stack(decoded)).to(tiles_BHWC.device)

    return apply


def blur(sigma: float) -> Callable[[Tensor], Tensor]:
    """Gaussian blur with this standard deviation in pixels, reflected at the border."""
    radius = math.ceil(3 * sigma)
    tap = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    tap = tap / tap.sum()

    def apply(tiles_BHWC: Tensor) -> Tensor:
        planes = tiles_BHWC.permute(0, 3, 1, 2).float()
        kernel = tap.to(planes.device).expand(3, 1, -1)
        padded = F.pad(planes, (radius,) * 4, mode="reflect")
        across = F.conv2d(padded, kernel[:, :, None, :], groups=3)
        return _levels(F.conv2d(across, kernel[:, :, :, None], groups=3).permute(0, 2, 3, 1))

    return apply


def _levels(values: Tensor) -> Tensor:
    return values.round_().clamp_(0, 255).to(torch.uint8)


def _family(name: str, *settings: tuple[str, Callable[[Tensor], Tensor]]) -> list[Shift]:
    return [Shift(name, strength, text, apply) for strength, (text, apply) in enumerate(settings, start=1)]


SHIFTS = (
    *_family(
        "stain",
        *((f"haematoxylin x {h:g}, eosin x {e:g}", stain(h, e)) for h, e in ((1.15, 0.85), (1.3, 0.7), (1.45, 0.55))),
    ),
    *_family(
        "scanner",
        *(
            (f"gamma {g:g}, red x {r:g}, blue x {b:g}", scanner(g, r, b))
            for g, r, b in ((1.15, 1.0, 0.97), (1.3, 1.0, 0.94), (1.45, 1.0, 0.91))
        ),
    ),
    *_family("JPEG", *((f"quality {quality}, 4:2:0", jpeg(quality)) for quality in (70, 50, 30))),
    *_family("blur", *((f"sigma {sigma:g} pixels", blur(sigma)) for sigma in (0.5, 1.0, 1.5))),
)
"""All shifts. Strengths of a family rise; those of different families do not compare."""
FAMILIES = tuple(dict.fromkeys(shift.family for shift in SHIFTS))
