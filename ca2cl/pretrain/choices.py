"""Method and precision of views, as a job's settings choose them."""

from __future__ import annotations

from typing import Literal

import torch

from ca2cl.methods.base import Method, MethodSettings
from ca2cl.methods.registry import build_method
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.runtime.precision import HALF


def configured_method(config: PretrainConfig) -> Method:
    """The method that ``method.name`` names, with its settings.

    Raises:
        InputError: there is none of that name, or it refuses its settings.
    """
    accumulation: Literal["exact", "plain"] = "plain" if config.run.accumulation == "plain" else "exact"
    settings = MethodSettings(config.objective, config.model.projection_dim, accumulation)
    return build_method(config.method.name, settings, config.method.options)


def views_dtype(config: PretrainConfig) -> torch.dtype:
    """The precision to which autocast rounds the network's input; fp32 for the sums of ``bitwise``."""
    run = config.run
    return HALF.get(run.precision, torch.float32) if run.accumulation != "bitwise" else torch.float32
