"""Optimizers by name.

LARS is here because neither torch nor a library that is needed anyway has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ca2cl.config import OptimConfig
from ca2cl.training.param_groups import Layered, param_groups


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., arXiv 1708.03888), as SimCLR uses it.

    A matrix or kernel w with gradient g moves along u = g + decay * w, scaled by trust * |w| / |u|; vectors (biases
    and BatchNorm) are neither decayed nor scaled.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; ``closure`` recomputes the loss where it is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        update = parameter.grad
        if parameter.ndim > 1:
            update = update + group["weight_decay"] * parameter
            weight_norm, update_norm = parameter.norm(), update.norm()
            trust = group["trust"] * weight_norm / update_norm
            update = update * torch.where((weight_norm > 0) & (update_norm > 0), trust, torch.ones_like(trust))
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
        parameter.add_(buffer, alpha=-group["lr"])


def build_optimizer(
    config: OptimConfig, network: nn.Module, encoder: Layered | None = None, *, fused: bool = False
) -> torch.optim.Optimizer:
    """The optimizer that ``config`` names, over all trainable parameters of ``network``.

    Args:
        config: name, rates and groups.
        network: what is trained.
        encoder: the part of it that has layers, for ``param_groups``.
        fused: one kernel for a group's parameters, as GPUs want it; LARS has none.

    Raises:
        InputError: see ``param_groups``.
    """
    params = param_groups(config, network, encoder)
    rates: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.name == "lars":
        return LARS(params, momentum=config.momentum, **rates)
    if fused:
        rates["fused"] = True
    if config.name == "adam":
        return torch.optim.Adam(params, betas=(config.momentum, 0.999), **rates)
    if config.name == "adamw":
        return torch.optim.AdamW(params, betas=(config.momentum, 0.999), **rates)
    nesterov = config.name == "sgd" and config.momentum > 0
    return torch.optim.SGD(params, momentum=config.momentum, nesterov=nesterov, **rates)
