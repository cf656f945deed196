"""Export to timm: a file for ``create_model(checkpoint_path=...)``.

The encoder is one of timm's own bodies, or a ResNet: timm's plain ones have torchvision's key names.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

from ca2cl.common.arch_names import TIMM as PREFIX
from ca2cl.errors import InputError
from ca2cl.export.target import Features, Target, behind_normalisation, plain_state, torch_bytes
from ca2cl.models.backbone import Backbone, outline
from ca2cl.models.encoder_io import EncoderCard
from ca2cl.models.resnet import require_resnet
from ca2cl.models.timm.spelling import built, create_arguments, timm_name


def _model(card: EncoderCard) -> tuple[str, dict[str, Any]]:
    """timm's name of the model, and the arguments that it must be created with, as plain values.

    Raises:
        InputError: timm has no such body, or no such pooling.
    """
    if not card.arch.startswith(PREFIX):
        require_resnet(card.arch, "export --to timm")
        return card.arch, {}
    arguments = create_arguments(card.arch, card.input_size)
    if card.pooling == "both":
        raise InputError("export --to timm: timm has no pooling of class token and mean together; use another format")
    if card.pooling != "default":
        body = outline(card.arch, image_size=card.input_size).get_submodule("body")
        arguments["global_pool"] = {"class": "token", "mean": "avg"}[card.pooling]
        if hasattr(body, "fc_norm"):  # timm would move the last norm with the pooling
            arguments["fc_norm"] = not isinstance(body.fc_norm, nn.Identity)
    return timm_name(card.arch), arguments


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
        import timm
        import timm.data.config

        # strictly: create_model(checkpoint_path=...) fails on a tensor too many or too few
        name, arguments = _model(card)
        data = data_settings(card)
        model = timm.create_model(
            name, num_classes=0, checkpoint_path=str(path), pretrained_cfg_overlay=data, **built(arguments)
        )
        found = timm.data.config.resolve_model_data_config(model)  # type: ignore[no-untyped-call]
        # the normalisation that timm will use, so that a wrong one shows in the features
        read = replace(card, mean=tuple(found["mean"]), std=tuple(found["std"]))
        return behind_normalisation(model.eval(), read)

    def snippet(self, path: Path, card: EncoderCard) -> str:
        name, given = _model(card)
        arguments = "".join(f"{key}={_spelt(key, value)}, " for key, value in given.items())
        return (
            "import timm\n"
            f"data = {data_settings(card)!r}\n"
            f"model = timm.create_model({name!r}, num_classes=0, {arguments}checkpoint_path={str(path)!r}, "
            "pretrained_cfg_overlay=data).eval()\n"
        )


def _spelt(key: str, value: Any) -> str:
    return f"timm.layers.{value}" if key == "mlp_layer" else repr(value)


TIMM = Timm()
