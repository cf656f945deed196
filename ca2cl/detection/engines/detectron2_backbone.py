"""An encoder with its feature pyramid as a detectron2 backbone.

For bodies that detectron2 has none of its own for. The pyramid is the one that torchvision's engine trains. Imports
detectron2, as ``detectron2_model`` does.
"""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from ca2cl.detection.engines.checkpoint import DetectorCard
from ca2cl.detection.network.body import STRIDES, build_body
from ca2cl.detection.network.pyramid import CHANNELS, Pyramid
from ca2cl.models.batch_norm import commit_statistics, recording


class PyramidBackbone(Backbone):  # type: ignore[misc, unused-ignore]
    """``Pyramid`` under detectron2's names: p2 to p6, or p3 to p7.

    BatchNorm's running statistics are updated by every pass while training, as those of torch's layers are.
    """

    def __init__(self, pyramid: Pyramid, first: int, count: int) -> None:
        super().__init__()
        self.pyramid = pyramid
        self._strides = {f"p{number}": 2**number for number in range(first, first + count)}

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Levels by name, of normalised images."""
        with recording(self, 0 if self.training else None):
            levels = self.pyramid(images_BCHW)
        if self.training:
            commit_statistics(self)
        return dict(zip(self._strides, levels.values(), strict=True))

    @property
    def size_divisibility(self) -> int:
        """Images are padded to multiples of it."""
        return STRIDES[-1]

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every level."""
        return {name: ShapeSpec(channels=CHANNELS, stride=stride) for name, stride in self._strides.items()}


def build_ca2cl_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> PyramidBackbone:
    """The backbone that ``MODEL.CA2CL`` describes; detectron2 calls it by its name."""
    own = cfg.MODEL.CA2CL
    body = build_body(own.ARCH, own.NORM, own.INPUT_SIZE, cfg.MODEL.BACKBONE.FREEZE_AT)
    if cfg.MODEL.META_ARCHITECTURE == "RetinaNet":
        return PyramidBackbone(Pyramid(body, 8, LastLevelP6P7(CHANNELS, CHANNELS), own.NORM), 3, 5)
    return PyramidBackbone(Pyramid(body, 4, LastLevelMaxPool(), own.NORM), 2, 5)


BACKBONE_REGISTRY.register(build_ca2cl_backbone)


def describe(cfg: CfgNode, card: DetectorCard) -> None:
    """Write the backbone of ``card`` into a configuration."""
    cfg.MODEL.BACKBONE.NAME = build_ca2cl_backbone.__name__
    cfg.MODEL.CA2CL = CfgNode({"ARCH": card.arch, "NORM": card.norm, "INPUT_SIZE": card.input_size})
