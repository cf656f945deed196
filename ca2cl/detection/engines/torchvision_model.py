"""torchvision detectors on an encoder's backbone: Mask R-CNN and RetinaNet.

The body is the encoder itself, tensor by tensor, and not a copy under other names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from ca2cl.detection.engines.checkpoint import DetectorCard
from ca2cl.detection.engines.settings import Head
from ca2cl.detection.network.body import build_body
from ca2cl.detection.network.pyramid import CHANNELS, Pyramid
from ca2cl.models.backbone import Backbone
from ca2cl.models.batch_norm import recording

HEADS: tuple[Head, ...] = ("mask_rcnn_fpn", "retinanet_fpn")


class DetectionNetwork(nn.Module):
    """A detector as the engine trains it.

    Attributes:
        model: torchvision's.
        autocast_dtype: the precision that passes are autocast to, torch.float16 or torch.bfloat16; None: to none.
        train_sides: shorter sides that images are resized to while training, one drawn at random.
        test_side: shorter side otherwise.
    """

    def __init__(self, model: MaskRCNN | RetinaNet, train_sides: tuple[int, ...], test_side: int) -> None:
        super().__init__()
        self.autocast_dtype: torch.dtype | None = None
        self.model, self.train_sides, self.test_side = model, train_sides, test_side
        # torchvision's Mask R-CNN counts the background as class 0, its RetinaNet has none
        self.first_label = 1 if isinstance(model, MaskRCNN) else 0
        self.train()

    @property
    def body(self) -> Backbone:
        """The encoder inside it."""
        pyramid = self.model.backbone
        assert isinstance(pyramid, Pyramid)
        return pyramid.body

    def train(self, mode: bool = True) -> DetectionNetwork:
        """Set the mode (``eval`` calls this, too), and with it the sides that images are resized to."""
        self.model.transform.min_size = self.train_sides if mode else (self.test_side,)
        return super().train(mode)

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses by name while training, and what is found otherwise, of RGB images (3, H, W) from 0 to 1; labels from
        0 either way."""
        half, slot = self.autocast_dtype, 0 if self.training else None
        if targets is not None:
            targets = [{**target, "labels": target["labels"] + self.first_label} for target in targets]
        with recording(self, slot), torch.autocast(images[0].device.type, half, enabled=half is not None):
            found: dict[str, Tensor] | list[dict[str, Tensor]] = self.model(images, targets)
        if isinstance(found, list):
            found = [{**one, "labels": one["labels"] - self.first_label} for one in found]
        return found

    def record(self, images: list[Tensor]) -> None:
        """Pass images through the body and pyramid alone, for BatchNorm's statistics."""
        half = self.autocast_dtype
        with recording(self, 0), torch.autocast(images[0].device.type, half, enabled=half is not None):
            self.model.backbone(self.model.transform(images)[0].tensors)


def build_network(card: DetectorCard, sides: Sequence[int] = (), frozen_stages: int = 0) -> DetectionNetwork:
    """A detector with new weights, from torch's global generator.

    Args:
        card: what it is.
        sides: shorter sides that training images are resized to, one drawn at random.
        frozen_stages: stem and stages, from the input, that are not trained.

    Raises:
        InputError: no pyramid can be built on the body, or it has fewer stages.
    """
    body = build_body(card.arch, card.norm, card.input_size, frozen_stages)
    how: dict[str, Any] = {"max_size": card.longest_side, "image_mean": list(card.mean), "image_std": list(card.std)}
    model: MaskRCNN | RetinaNet
    if card.head == "mask_rcnn_fpn":
        model = MaskRCNN(Pyramid(body, 4, LastLevelMaxPool(), card.norm), len(card.classes) + 1, **how)
    else:
        model = RetinaNet(Pyramid(body, 8, LastLevelP6P7(CHANNELS, CHANNELS), card.norm), len(card.classes), **how)
    return DetectionNetwork(model, tuple(sides), card.test_side)
