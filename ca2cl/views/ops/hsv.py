"""Shift hue, saturation and value in OpenCV's 8-bit units.

Hue in 0 ... 180, the others in 0 ... 255.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ca2cl.views.ops.subset import per_sample

# Below it a pixel is grey: it has no hue, and red stands for none, as is the convention.
_GREY = 1e-6


def shift_hsv(images: Tensor, hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Add to hue (around the circle), saturation and value (both held in their range).

    Args:
        images: float32 (B, 3, H, W), RGB in [0, 1].
        hue: float64 (B,), in half degrees, from -30 to 30.
        saturation: float64 (B,), of 255.
        value: float64 (B,), of 255.

    Returns:
        float32 (B, 3, H, W) in [0, 1].
    """
    high, low = images.amax(1), images.amin(1)
    angle = signed_hue(images, high, low).add_(per_sample(hue / 30.0, high))
    chroma = high.sub(low).div_(low.copy_(high).clamp_(min=_GREY))
    high.add_(per_sample(value / 255.0, high)).clamp_(0.0, 1.0)
    chroma.add_(per_sample(saturation / 255.0, chroma)).clamp_(0.0, 1.0).mul_(high)
    out = torch.empty_like(images)
    # Distance on the circle from red, green and blue, which lie at 0, 2 and -2 sixths: within one the channel is full,
    # from two on it has lost all of the chroma.
    torch.abs(angle, out=out[:, 0])
    torch.add(angle, 1.0, out=out[:, 1]).abs_().sub_(3.0).abs_()
    torch.sub(angle, 1.0, out=out[:, 2]).abs_().sub_(3.0).abs_()
    out.sub_(1.0).clamp_(0.0, 1.0).mul_(chroma[:, None])
    return torch.sub(high[:, None], out, out=out)


def signed_hue(images: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """Hue in sixths of the circle, from -3 to 3, red at 0 and green at 2; float32 (B, H, W).

    From red over green to cyan, the distances (green - low) + (blue - low) + (high - red) rise from 0 to three times
    the chroma, one after the other; from red over blue they do the same. So no pixel asks which channel is the largest.
    """
    red, green, blue = images.unbind(1)
    angle = (green - low).add_(blue).sub_(low).add_(high).sub_(red)
    angle.div_((high - low).clamp_(min=_GREY))
    return torch.copysign(angle, green - blue)
