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

from ca2cl.detection.engines.base import Head
from ca2cl.errors import InputError
from ca2cl.models.backbone import BackboneOptions
from ca2cl.models.batch_norm import BatchNorm, Norm, recording
from ca2cl.models.resnet import ResNet, build

_PYRAMID = 256  # channels of every level (Lin et al., arXiv 1612.03144, section 3)
_STAGES = ("layer1", "layer2", "layer3", "layer4")
HEADS: tuple[Head, ...] = ("mask_rcnn_fpn", "retinanet_fpn")


class DetectionNetwork(nn.Module):
    """A detector as the engine trains it.

    Attributes:
        model: torchvision's.
        autocast_dtype: the precision that passes are autocast to, torch.float16 or torch.bfloat16; None: to none.
    """

    def __init__(self, model: MaskRCNN | RetinaNet) -> None:
        super().__init__()
        self.autocast_dtype: torch.dtype | None = None
        self.model = model
        # torchvision's Mask R-CNN counts the background as class 0, its RetinaNet has none
        self.first_label = 1 if isinstance(model, MaskRCNN) else 0

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


def build_network(
    head: Head,
    arch: str,
    classes: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    sides: Sequence[int],
    longest_side: int,
    norm: Norm,
    frozen_stages: int = 0,
) -> DetectionNetwork:
    """A detector with new weights, from torch's global generator.

    Args:
        classes: without the background.
        sides: shorter sides that images are resized to, one drawn at random while training.
        norm: of the BatchNorm in body and pyramid. A new encoder's statistics are no good, so with ``frozen`` the
            pyramid, which is new, has none.
        frozen_stages: stem and stages, from the input, that are not trained.

    Raises:
        InputError: another head than ``HEADS``.
    """
    if head not in HEADS:
        raise InputError(f"head is {head}: the torchvision engine has {' and '.join(HEADS)}; use engine detectron2")
    body = build(arch, BackboneOptions(norm=norm))
    _freeze(body, frozen_stages)
    pyramid_norm = partial(BatchNorm, norm=norm) if norm != "frozen" else None
    how: dict[str, Any] = {"min_size": tuple(sides), "max_size": longest_side}
    how |= {"image_mean": list(mean), "image_std": list(std)}
    if head == "mask_rcnn_fpn":
        levels = _pyramid(body, _STAGES, LastLevelMaxPool(), pyramid_norm)
        return DetectionNetwork(MaskRCNN(levels, classes + 1, **how))
    levels = _pyramid(body, _STAGES[1:], LastLevelP6P7(_PYRAMID, _PYRAMID), pyramid_norm)
    return DetectionNetwork(RetinaNet(levels, classes, **how))


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
        told = " ".join(str(error).split())[:300]
        raise InputError(f"{source}: does not fill the detector's backbone exactly ({told}); give another") from None
