"""Export to timm: a file for ``create_model(checkpoint_path=...)``.

The encoder is one of timm's own bodies, or a ResNet: timm's plain ones have torchvision's key names.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ca2cl.common.optional import need
from ca2cl.export.target import EXTRA, Features, Target, behind_normalisation, plain_state, torch_bytes
from ca2cl.models.backbone import Backbone
from ca2cl.models.encoder_io import EncoderCard, make_encoder, read_weights
from ca2cl.models.resnet import require_resnet
from ca2cl.models.timm import PREFIX, size_arguments, timm_name


def _model(card: EncoderCard) -> tuple[str, dict[str, Any]]:
    """timm's name of the model, and the arguments that it must be created with."""
    if card.arch.startswith(PREFIX):
        return timm_name(card.arch), size_arguments(card.arch, card.input_size)
    require_resnet(card.arch, "export --to timm")
    return card.arch, {}


def data_settings(card: EncoderCard) -> dict[str, Any]:
    """Settings for ``timm.data.resolve_model_data_config``: timm's default for these names is ImageNet at 224 px."""
    side = card.input_size
    return {
        "input_size": (3, side, side),
        "mean": card.mean,
        "std": card.std,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
    }


class Timm(Target):
    """A file for ``create_model(checkpoint_path=...)``."""

    name, package = "timm", "timm"
    suffixes = (".safetensors", ".pth", ".pt")

    def build(self, encoder: Backbone, card: EncoderCard, out: Path) -> dict[str, bytes]:
        _model(card)
        state = plain_state(encoder)
        if out.suffix == ".safetensors":
            return {out.name: save(state, metadata={"format": "pt"})}
        return {out.name: torch_bytes(state)}

    def native(self, path: Path, card: EncoderCard) -> Features:
        timm = need("timm", EXTRA)
        # strictly: create_model(checkpoint_path=...) fails on a tensor too many or too few
        name, size = _model(card)
        model = timm.create_model(
            name, num_classes=0, checkpoint_path=str(path), pretrained_cfg_overlay=data_settings(card), **size
        )
        found = timm.data.resolve_model_data_config(model)
        # the normalisation that timm will use, so that a wrong one shows in the features
        read = replace(card, mean=tuple(found["mean"]), std=tuple(found["std"]))
        return behind_normalisation(model.eval(), read)

    def own(self, path: Path, card: EncoderCard) -> Features:
        state = read_weights(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        return behind_normalisation(make_encoder(state, card.arch, str(path), card.input_size), card)

    def snippet(self, path: Path, card: EncoderCard) -> str:
        name, size = _model(card)
        arguments = "".join(f"{key}={value!r}, " for key, value in size.items())
        return (
            "import timm\n"
            f"data = {data_settings(card)!r}\n"
            f"model = timm.create_model({name!r}, num_classes=0, {arguments}checkpoint_path={str(path)!r}, "
            "pretrained_cfg_overlay=data).eval()\n"
        )


TIMM = Timm()
