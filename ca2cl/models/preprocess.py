"""Preprocess tiles for a frozen encoder: resize, scale, normalise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ca2cl.runtime.device import to_device


def normalise_(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images - mean) / std by channel, in place.

    Args:
        images: float32 (B, 3, H, W) in [0, 1].
        mean: of the channels, in [0, 1].
        std: of the channels.
    """
    factors = torch.tensor([[1.0 / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)]])
    scale, shift = to_device(factors, images.device).view(2, 1, 3, 1, 1)
    return images.mul_(scale).add_(shift)


def to_planes(tiles_BHWC: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) → float32 (B, 3, H, W) in [0, 1], one plane a channel.

    Raises:
        ValueError: not a uint8 batch of RGB tiles.
    """
    if tiles_BHWC.dtype != torch.uint8 or tiles_BHWC.ndim != 4 or tiles_BHWC.shape[-1] != 3:
        raise ValueError(f"tiles are {tiles_BHWC.dtype} {tuple(tiles_BHWC.shape)}: give uint8 (B, H, W, 3)")
    planes = tiles_BHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return planes.mul_(1.0 / 255.0)


def preprocess(tiles_BHWC: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Tiles as the frozen encoder's input: what probe, embed and serving use.

    Args:
        tiles_BHWC: uint8 (B, H, W, 3), RGB, any device.
        size: side S of the result; the resize is bilinear with an antialiasing filter.
        mean: of the channels, in [0, 1].
        std: of the channels.

    Returns:
        float32 (B, 3, S, S), normalised, channels_last.
    """
    planes = to_planes(tiles_BHWC)
    if planes.shape[-2:] != (size, size):
        planes = F.interpolate(planes, (size, size), mode="bilinear", align_corners=False, antialias=True)
    return normalise_(planes, mean, std).contiguous(memory_format=torch.channels_last)
