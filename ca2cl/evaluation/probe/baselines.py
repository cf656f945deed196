"""Baseline features: colour histograms.

``encoders`` has the other baselines, the same network untrained and with ImageNet weights.

On CRC-VAL-HE-7K a colour histogram alone passes 82 % (arXiv 2409.11546), so no table of ca2cl comes without one.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 32


def colour_histogram(tiles_BHWC: Tensor, bins: int = BINS) -> Tensor:
    """Share of a tile's pixels in each of ``bins`` equal ranges of red, then of green, then of blue.

    Args:
        tiles_BHWC: uint8, shape (B, H, W, 3).
        bins: a divisor of 256.

    Returns:
        float32, shape (B, 3 * bins); each third of a row sums to 1.
    """
    assert tiles_BHWC.dtype == torch.uint8 and 256 % bins == 0
    batch, height, width, channels = tiles_BHWC.shape
    # One bincount for the whole batch: every (tile, channel) pair gets its own range of bins. In place and in int32:
    # the numbers fit, and memory traffic is what this costs.
    offset_BC = torch.arange(batch * channels, dtype=torch.int32, device=tiles_BHWC.device) * bins
    bin_BHWC = (tiles_BHWC // (256 // bins)).int().add_(offset_BC.view(batch, 1, 1, channels))
    counts = torch.bincount(bin_BHWC.flatten(), minlength=batch * channels * bins)
    return (counts.view(batch, channels * bins) / (height * width)).float()
