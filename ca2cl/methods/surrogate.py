"""Scalar with a precomputed gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, *tensors_and_gradients: Tensor) -> Tensor:
        count = len(tensors_and_gradients) // 2
        ctx.save_for_backward(*tensors_and_gradients[count:])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        return (None, *(outer[0] * gradient for gradient in gradients), *(None for _ in gradients))


def given_gradient(value: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """``value``, a scalar, such that its gradient with respect to each tensor of ``pairs`` is the one beside it."""
    tensors, gradients = zip(*pairs, strict=True)
    result: Tensor = _Given.apply(value.detach(), *tensors, *(gradient.detach() for gradient in gradients))
    return result
