"""Adversarial direction on the stem's weight (CA2CL, section III; docs/mathematics.md)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ca2cl.methods.base import Engine


def stem_weight(engine: Engine) -> Tensor:
    """W, the weight that the adversary perturbs; every rank calls it."""
    return engine.whole(engine.bare.encoder.stem.weight)


def zero_perturbation(weight: Tensor) -> Tensor:
    """delta = 0 as a leaf. In double precision: its gradient is a sum over the batch (``models.perturbed_conv``)."""
    return torch.zeros_like(weight, dtype=torch.float64, requires_grad=True)


def perturbation(
    gradient: Tensor, weight: Tensor, epsilon: float, mode: Literal["absolute", "relative"]
) -> tuple[Tensor, Tensor]:
    """delta = epsilon * gradient / |gradient|_F, times |weight|_F when ``mode`` is relative.

    Args:
        gradient: dL1/dW over the global batch, the shape of W, in any positive scale.
        weight: W.

    Returns:
        delta (zeros where there is no direction) and a boolean scalar, False for a zero or non-finite norm.
    """
    # Divided by the largest entry first: a loss scale of fp16 must not overflow the sum of squares.
    largest = gradient.abs().amax()
    scaled = gradient / largest
    # in double precision: layouts of the weight differ from engine to engine, and with them the order of this sum
    size = weight.detach().double().norm() if mode == "relative" else 1.0
    delta = epsilon * size * scaled / scaled.norm()
    valid = torch.isfinite(largest) & (largest > 0)
    return torch.where(valid, delta, torch.zeros_like(delta)), valid
