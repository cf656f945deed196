"""Export to torchvision: a ResNet state dict without ``fc``."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision

from ca2cl.export.target import Features, Target, behind_normalisation, plain_state, torch_bytes
from ca2cl.models.backbone import Backbone
from ca2cl.models.encoder_io import EncoderCard
from ca2cl.models.resnet import require_resnet


class Torchvision(Target):
    """A ResNet state dict without ``fc``."""

    name, package = "torchvision", "torchvision"
    suffixes = (".pth", ".pt")

    def build(self, encoder: Backbone, card: EncoderCard, out: Path) -> dict[str, bytes]:
        require_resnet(card.arch, "export --to torchvision")
        return {out.name: torch_bytes(plain_state(encoder))}

    def native(self, path: Path, card: EncoderCard) -> Features:
        model = torchvision.models.get_model(card.arch)
        model.fc = torch.nn.Identity()
        model.load_state_dict(torch.load(path, weights_only=True))
        return behind_normalisation(model.eval(), card)

    def snippet(self, path: Path, card: EncoderCard) -> str:
        return (
            "import torch, torchvision\n"
            f"model = torchvision.models.{card.arch}(); model.fc = torch.nn.Identity(); model.eval()\n"
            f"model.load_state_dict(torch.load({str(path)!r}, weights_only=True))\n"
        )


TORCHVISION = Torchvision()
