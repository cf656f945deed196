"""Optimizer of a detector."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ca2cl.config import OptimConfig
from ca2cl.models.backbone import Backbone
from ca2cl.models.batch_norm import BatchNorm
from ca2cl.training.optim import build_optimizer


def detector_optimizer(config: OptimConfig, network: nn.Module, body: Backbone) -> torch.optim.Optimizer:
    """The optimizer of all trainable parameters of ``network``.

    AdamW and layer-wise rates have the groups of pre-training; norms, biases, tokens and position embeddings do not
    decay. SGD decays biases too, and spares BatchNorm, as detectron2 (``SOLVER.WEIGHT_DECAY_NORM``).

    Args:
        config: name, rates, decay and ``layer_decay``.
        network: the detector.
        body: its encoder.

    Raises:
        InputError: ``layer_decay`` for a body that does not number its layers.
    """
    if config.name == "adamw" or config.layer_decay is not None:
        return build_optimizer(replace(config, decay_all=False), network, body)
    decayed: list[Tensor] = []
    norms: list[Tensor] = []
    for module in network.modules():
        group = norms if isinstance(module, BatchNorm) else decayed
        group += [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": decayed}]
    if norms:
        groups.append({"params": norms, "weight_decay": 0.0})
    return torch.optim.SGD(groups, config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
