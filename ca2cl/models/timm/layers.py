"""Replace a timm model's BatchNorm, stochastic depth and dropout."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ca2cl.models.backbone import BackboneOptions
from ca2cl.models.batch_norm import BatchNorm
from ca2cl.models.blocks.drop_path import RowDraws


class _NormAct(BatchNorm):
    """timm's BatchNorm with an activation of its own."""

    act: nn.Module
    drop: nn.Module

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x: Tensor = self.act(self.drop(super().forward(x_BCHW)))
        return x


def replace_norms(body: nn.Module, options: BackboneOptions) -> None:
    """Put ours in the place of every BatchNorm, with its very tensors."""
    for path, layer in list(body.named_modules()):
        if not isinstance(layer, nn.BatchNorm2d):
            continue
        kind = _NormAct if hasattr(layer, "act") else BatchNorm
        own = kind(layer.num_features, options.norm, options.group)
        own.eps, own.momentum = layer.eps, layer.momentum
        own._parameters, own._buffers = layer._parameters, layer._buffers
        own._modules = layer._modules
        put(body, path, own)


def replace_drop_paths(body: nn.Module) -> None:
    """Put ours in the place of every stochastic depth, with its rate."""
    from timm.layers.drop import DropPath

    draws = RowDraws()
    for path, layer in list(body.named_modules()):
        if isinstance(layer, DropPath) and layer.drop_prob:
            put(body, path, draws.layer(float(layer.drop_prob)))


def put(model: nn.Module, path: str, module: Any) -> Any:
    """``module`` in the place that ``path`` names."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
    return module


def turn_off_dropout(body: nn.Module) -> None:
    """Set the rates of dropout, stochastic depth and patch dropout to 0."""
    for module in body.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        # timm's DropPath and PatchDropout, and what models apply by a function
        for name in ("drop_prob", "prob", "drop_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
