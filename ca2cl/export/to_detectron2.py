"""Export to detectron2: a ``.pth`` backbone and its settings.

A ``.pkl``, which detectron2's own converter writes, would be a pickle; its checkpointer reads a ``.pth`` just as well.
"""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from ca2cl.detection.engines.detectron2_weights import checkpoint, detectron2_names, load_backbone, settings
from ca2cl.export.target import Features, Target, behind_normalisation, plain_state, torch_bytes
from ca2cl.models.backbone import Backbone, build_encoder
from ca2cl.models.encoder_io import EncoderCard, make_encoder

_HEAD = """\
# An encoder of ca2cl as a detectron2 backbone. Merge it after a detector's own configuration, such as
# COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml; pixels are RGB from 0 to 255.
# To train all of it on tissue, also MODEL.BACKBONE.FREEZE_AT 0 and MODEL.RESNETS.NORM SyncBN, and in an FPN its NORM.
"""


def _config(path: Path) -> Path:
    return path.with_suffix(".yaml")


class Detectron2(Target):
    """A ``.pth`` of a ResNet and a ``.yaml`` of the settings that belong to it."""

    name, package = "detectron2", "detectron2"
    suffixes = (".pth",)

    def build(self, encoder: Backbone, card: EncoderCard, out: Path) -> dict[str, bytes]:
        text = _HEAD + yaml.safe_dump(
            settings(card.arch, card.mean, card.std, out), sort_keys=False, default_flow_style=None
        )
        return {
            _config(out).name: text.encode(),
            out.name: torch_bytes(checkpoint(plain_state(encoder))),
        }

    def native(self, path: Path, card: EncoderCard) -> Features:
        return load_backbone(path, _config(path))

    def own(self, path: Path, card: EncoderCard) -> Features:
        # the way back: every name of the architecture under its name in detectron2, and none left over
        given = torch.load(path, weights_only=True)["model"]
        back = {there: here for here, there in detectron2_names(build_encoder(card.arch).state_dict()).items()}
        encoder = make_encoder({back.get(name, name): tensor for name, tensor in given.items()}, card.arch, str(path))
        return behind_normalisation(encoder, card)

    def snippet(self, path: Path, card: EncoderCard) -> str:
        return (
            "from detectron2 import checkpoint, config, layers, modeling\n"
            f"cfg = config.get_cfg(); cfg.merge_from_file({str(_config(path))!r}); "
            "model = modeling.build_resnet_backbone(cfg, layers.ShapeSpec(channels=3)).eval()\n"
            "checkpoint.DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)\n"
        )


DETECTRON2 = Detectron2()
