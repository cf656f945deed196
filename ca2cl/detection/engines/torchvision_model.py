"""torchvision detectors on an encoder's backbone: Mask R-CNN and RetinaNet.

The body is the encoder itself, tensor by tensor, and not a copy under other names, so none of it can be left behind;
that is checked all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from ca2cl.detection.engines.checkpoint import DetectorCard
from ca2cl.detection.engines.settings import Head
from ca2cl.errors import InputError
from ca2cl.models.backbone import BackboneOptions
from ca2cl.models.batch_norm import BatchNorm, recording
from ca2cl.models.resnet import ResNet, build

_PYRAMID = 256  # channels of every level (Lin et al., arXiv 1612.03144, section 3)
_STAGES = ("layer1", "layer2", "layer3", "layer4")
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
    """
    body = build(card.arch, BackboneOptions(norm=card.norm))
    _freeze(body, frozen_stages)
    # a new encoder's statistics are no good, so beside frozen BatchNorm the pyramid, which is new, has none
    norm = partial(BatchNorm, norm=card.norm) if card.norm != "frozen" else None
    how: dict[str, Any] = {"max_size": card.longest_side, "image_mean": list(card.mean), "image_std": list(card.std)}
    model: MaskRCNN | RetinaNet
    if card.head == "mask_rcnn_fpn":
        levels = _pyramid(body, _STAGES, LastLevelMaxPool(), norm)
        model = MaskRCNN(levels, len(card.classes) + 1, **how)
    else:
        levels = _pyramid(body, _STAGES[1:], LastLevelP6P7(_PYRAMID, _PYRAMID), norm)
        model = RetinaNet(levels, len(card.classes), **how)
    return DetectionNetwork(model, tuple(sides), card.test_side)


def _pyramid(body: ResNet, stages: Sequence[str], extra: nn.Module, norm: partial[BatchNorm] | None) -> nn.Module:
    first = body.feature_dim // 8
    channels = [first * 2 ** _STAGES.index(stage) for stage in stages]
    levels = {stage: str(number) for number, stage in enumerate(stages)}
    return BackboneWithFPN(body, levels, channels, _PYRAMID, extra, norm)  # type: ignore[no-any-return, arg-type, unused-ignore]


def _freeze(body: ResNet, stages: int) -> None:
    parts: list[list[nn.Module]] = [[body.conv1, body.bn1], *([getattr(body, stage)] for stage in _STAGES)]
    for module in (module for part in parts[:stages] for module in part):
        module.requires_grad_(False)
        for layer in module.modules():
            if isinstance(layer, BatchNorm):
                layer.norm = "frozen"


def load_body(network: DetectionNetwork, encoder: Mapping[str, Tensor], source: str) -> None:
    """Give the body the encoder's tensors.

    Raises:
        InputError: a tensor that either side has and the other has not, or of another shape.
    """
    body: nn.Module = network.model.backbone.body  # type: ignore[assignment, union-attr, unused-ignore]
    try:
        body.load_state_dict(dict(encoder), strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{source}: does not fill the detector's backbone exactly ({reason}); give another") from None
