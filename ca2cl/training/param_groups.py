"""Optimizer parameter groups: layer-wise rates, weight decay and frozen layers.

A group is a dictionary as torch's optimizers take it, with two entries of our own: ``lr_scale`` (timm's name) is a
factor on the rate, and ``frozen_steps`` is the number of steps for which the rate is 0.

A frozen parameter keeps its gradient. What DistributedDataParallel's and ZeRO's buckets hold then does not change
during a run, and moments follow the gradient. From moments of 0 at a step count of many, Adam's first updates would be
up to 6.6 times as large as usual: (1 - .9^k) / sqrt(1 - .999^k) in the k-th step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from typing import Any, Protocol

from torch import Tensor, nn

from ca2cl.config import OptimConfig
from ca2cl.errors import InputError

Group = dict[str, Any]


class Layered(Protocol):
    """An encoder that knows its layers (``models.backbone.Backbone``)."""

    arch: str

    def layers(self) -> Mapping[str, int]:
        """Number of each parameter's layer by name, from 0, the stem's; one without is trained like the heads."""

    def no_weight_decay(self) -> Iterable[str]:
        """Names, or patterns of names, of parameters that should not decay although they have several dimensions."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of a module."""


def param_groups(config: OptimConfig, network: nn.Module, encoder: Layered | None) -> list[Group]:
    """The trainable parameters of ``network`` in groups of equal rate and decay, in the network's order.

    With settings that tell no parameters apart it is one group.

    Args:
        config: ``layer_decay``, ``decay_all``, ``freeze_layers`` and ``freeze_steps``.
        network: what is trained.
        encoder: the part of it that has layers; everything else are heads.

    Raises:
        InputError: the encoder does not know its layers, or is to be frozen as a whole.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    if config.layer_decay is None and config.decay_all and not config.freeze_layers:
        return [{"params": parameters}]
    if encoder is None:
        raise InputError("optim.layer_decay, .freeze_layers and .decay_all are for encoders; leave them out")
    numbers, heads = _numbers(config, encoder)
    undecayed = set() if config.decay_all else _undecayed(parameters, encoder)
    groups: dict[tuple[float, bool, bool], Group] = {}
    for parameter in parameters:
        number = numbers.get(id(parameter), heads)
        scale = 1.0 if config.layer_decay is None else config.layer_decay ** (heads - number)
        decays, frozen = id(parameter) not in undecayed, number <= config.freeze_layers and bool(config.freeze_layers)
        group = groups.setdefault(
            (scale, decays, frozen),
            {
                "params": [],
                "lr_scale": scale,
                "weight_decay": config.weight_decay if decays else 0.0,
                "frozen_steps": config.freeze_steps if frozen else 0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def set_rates(groups: Iterable[Group], lr: float, step: int | None = None) -> None:
    """Set every group's rate for the optimizer step that follows ``step`` others; None: none is frozen any more."""
    for group in groups:
        frozen = step is not None and step < group.get("frozen_steps", 0)
        group["lr"] = 0.0 if frozen else lr * group.get("lr_scale", 1.0)


def _numbers(config: OptimConfig, encoder: Layered) -> tuple[dict[int, int], int]:
    """Each encoder parameter's layer, by the parameter's identity, and the heads' number."""
    if config.layer_decay is None and not config.freeze_layers:
        return {}, 0
    layers = encoder.layers()
    heads = max(layers.values()) + 1
    if config.freeze_layers >= heads - 1:
        raise InputError(
            f"optim.freeze_layers is {config.freeze_layers}: a {encoder.arch} has {heads - 1} behind its stem, and one "
            f"at least must train; use up to {heads - 2}"
        )
    named = encoder.named_parameters()
    return {id(parameter): layers[name] for name, parameter in named if name in layers}, heads


def _undecayed(parameters: Iterable[Tensor], encoder: Layered) -> set[int]:
    """Identities of vectors (norms, biases, layer scales) and of what the encoder names (tokens, positions)."""
    patterns = tuple(encoder.no_weight_decay())
    named = {id(p) for name, p in encoder.named_parameters() if any(fnmatch(name, pattern) for pattern in patterns)}
    return named | {id(p) for p in parameters if p.ndim <= 1}
