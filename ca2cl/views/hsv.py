"""Shift of hue, saturation and value, in OpenCV's units of an 8-bit image: hue in 0 … 180, the others in 0 … 255."""

from __future__ import annotations

import torch
from torch import Tensor

from ca2cl.views.subset import per_sample

_SMALLEST = 1e-12


def shift_hsv(images: Tensor, hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Add to hue (around the circle), saturation and value (both held in their range).

    Args:
        images: float32 (B, 3, H, W), RGB in [0, 1].
        hue: float64 (B,), in half degrees.
        saturation: float64 (B,), of 255.
        value: float64 (B,), of 255.

    Returns:
        float32 (B, 3, H, W) in [0, 1].
    """
    red, green, blue = images.unbind(1)
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    span = high - low
    # Sixths of the circle, from -1 to 5: which channel is the largest says which pair of sixths it is.
    sixth = torch.where(
        high == red,
        green - blue,
        torch.where(high == green, (blue - red).add_(span * 2.0), (red - green).add_(span * 4.0)),
    ).div_(span.clamp(min=_SMALLEST))
    sixth = sixth + per_sample(hue / 30.0, sixth)
    sixth = sixth - (sixth * (1.0 / 6.0)).floor_() * 6.0
    chroma = span / high.clamp(min=_SMALLEST)
    chroma = (chroma + per_sample(saturation / 255.0, chroma)).clamp_(0.0, 1.0)
    high = (high + per_sample(value / 255.0, high)).clamp_(0.0, 1.0)
    chroma.mul_(high)
    out = torch.empty_like(images)
    # Share of the chroma that a channel has lost: 0 within a sixth and a half of its own place on the circle.
    out[:, 0] = high - (2.0 - (sixth - 3.0).abs_()).clamp_(0.0, 1.0) * chroma
    out[:, 1] = high - ((sixth - 2.0).abs_() - 1.0).clamp_(0.0, 1.0) * chroma
    out[:, 2] = high - ((sixth - 4.0).abs_() - 1.0).clamp_(0.0, 1.0) * chroma
    return out
