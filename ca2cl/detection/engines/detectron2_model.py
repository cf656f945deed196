"""detectron2 detectors on an encoder's backbone.

Imports detectron2: only ``detectron2`` imports this, when that engine is chosen. Written against the pinned
commit (``weights.COMMIT``), with the names that the release 0.6 has too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import detectron2
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import get_norm
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock, ResNet
from detectron2.modeling.roi_heads import Res5ROIHeads
from detectron2.utils import comm
from torch import Tensor, nn

from ca2cl.detection.engines.checkpoint import DetectorCard
from ca2cl.detection.engines.detectron2_backbone import describe
from ca2cl.detection.engines.detectron2_weights import detectron2_names, pixel_settings, settings
from ca2cl.detection.engines.settings import Head, Schedule
from ca2cl.errors import InputError
from ca2cl.models.resnet import ARCHITECTURES

ZOO: dict[Head, str] = {
    "mask_rcnn_fpn": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml",
    "mask_rcnn_c4": "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_3x.yaml",
}
"""The configuration of detectron2's own that a head begins from; depth, norm and weights are the encoder's."""
_BLOCKS: dict[int, tuple[type[nn.Module], int]] = {
    18: (BasicBlock, 2), 34: (BasicBlock, 3), 50: (BottleneckBlock, 3),
}  # fmt: skip
"""By depth: the block that res5 is made of, and how many."""


@ROI_HEADS_REGISTRY.register()
class NormedRes5ROIHeads(Res5ROIHeads):
    """The C4 head of the MoCo protocol (He et al., arXiv 1911.05722, section 4.2.1): a BatchNorm after res5, so that
    what the predictors see has one scale whatever the encoder is; and res5 as the encoder has it, where detectron2's
    C4 is ResNet-50's and deeper ones' only."""

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Sequential, int]:
        resnets = cfg.MODEL.RESNETS
        block, count = _BLOCKS[resnets.DEPTH]
        out_channels = 8 * resnets.RES2_OUT_CHANNELS
        how: dict[str, Any] = {"in_channels": out_channels // 2, "out_channels": out_channels, "norm": resnets.NORM}
        if block is BottleneckBlock:
            how |= {"bottleneck_channels": 8 * resnets.WIDTH_PER_GROUP, "stride_in_1x1": resnets.STRIDE_IN_1X1}
        stage = ResNet.make_stage(block, count, stride_per_block=[2] + [1] * (count - 1), **how)
        res5 = nn.Sequential(*stage)
        res5.add_module("norm", get_norm(resnets.NORM, out_channels))
        return res5, out_channels


def configuration(card: DetectorCard, device: str, schedule: Schedule | None = None) -> CfgNode:
    """The whole configuration of a detector for detectron2; with a schedule also of its training."""
    cfg = get_cfg()
    if card.head == "retinanet_fpn":
        _retinanet(cfg)
    else:  # by its path: detectron2.model_zoo needs pkg_resources, which setuptools has no longer
        zoo = Path(detectron2.__file__).parent / "model_zoo" / "configs"
        cfg.merge_from_file(str(zoo / ZOO[card.head]), allow_unsafe=False)
    if card.head == "mask_rcnn_c4":
        cfg.MODEL.ROI_HEADS.NAME = NormedRes5ROIHeads.__name__
    cfg.MODEL.update(pixel_settings(card.mean, card.std))
    if card.arch in ARCHITECTURES:
        for name, value in settings(card.arch, card.mean, card.std)["MODEL"]["RESNETS"].items():
            if name != "OUT_FEATURES":  # the head's: C4 ends at res4, RetinaNet begins at res3
                cfg.MODEL.RESNETS[name] = value
    else:
        describe(cfg, card)
    cfg.MODEL.WEIGHTS = ""  # set tensor by tensor, in load_body
    cfg.MODEL.DEVICE = device
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = len(card.classes)
    cfg.MODEL.RESNETS.NORM, cfg.MODEL.FPN.NORM = _norms(card, device)
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = card.test_side, card.longest_side
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False  # which image stands where is this package's, see ImageOrder
    if schedule is not None:
        _train(cfg, schedule)
    return cfg


def _retinanet(cfg: CfgNode) -> None:
    """The settings of Lin et al., arXiv 1708.02002, section 4: detectron2's own file of them has code in it."""
    model, stages = cfg.MODEL, ["res3", "res4", "res5"]
    model.META_ARCHITECTURE = "RetinaNet"
    model.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    model.RESNETS.OUT_FEATURES, model.FPN.IN_FEATURES = stages, stages
    model.ANCHOR_GENERATOR.SIZES = [[side * 2 ** (third / 3) for third in range(3)] for side in (32, 64, 128, 256, 512)]
    model.RETINANET.IOU_THRESHOLDS, model.RETINANET.IOU_LABELS = [0.4, 0.5], [0, -1, 1]
    model.RETINANET.SMOOTH_L1_LOSS_BETA = 0.0


def _norms(card: DetectorCard, device: str) -> tuple[str, str]:
    """Of the body and of the pyramid."""
    if card.norm == "frozen":
        return "FrozenBN", ""
    # torch's SyncBatchNorm runs on one CPU process as BatchNorm, and not at all on several: there, detectron2's own
    sync = "naiveSyncBN" if torch.device(device).type == "cpu" and comm.get_world_size() > 1 else "SyncBN"
    return sync, sync


def _train(cfg: CfgNode, schedule: Schedule) -> None:
    cfg.MODEL.BACKBONE.FREEZE_AT = schedule.frozen_stages
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = schedule.train_sides, schedule.longest_side
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
    solver = cfg.SOLVER
    solver.IMS_PER_BATCH, solver.MAX_ITER = schedule.batch_size, schedule.iterations
    solver.BASE_LR, solver.MOMENTUM, solver.WEIGHT_DECAY = schedule.lr, schedule.momentum, schedule.weight_decay
    solver.STEPS, solver.GAMMA = schedule.milestones, 0.1
    # the n-th of w steps has n/w of the rate; detectron2 counts from 0 and reaches the rate one step later
    solver.WARMUP_ITERS = max(0, schedule.warmup - 1)
    solver.WARMUP_FACTOR = 1 / max(1, schedule.warmup)
    solver.CHECKPOINT_PERIOD = schedule.checkpoint_every
    solver.AMP.ENABLED = schedule.precision == "fp16"
    cfg.TEST.EVAL_PERIOD = schedule.evaluate_every
    cfg.TEST.PRECISE_BN.ENABLED = schedule.precise_norm
    cfg.SEED = schedule.seed


def load_body(network: nn.Module, encoder: Mapping[str, Tensor], source: str) -> list[str]:
    """Give the body the encoder's tensors; returns their names in the network.

    Args:
        encoder: torchvision's names → tensors.
        source: of the encoder, for the message.

    Raises:
        InputError: a tensor that either side has and the other has not, or of another shape.
    """
    own = network.state_dict()
    given = {there: encoder[here] for here, there in detectron2_names(encoder).items()}
    # a pyramid's bottom_up is the whole body; C4's backbone ends at res4 and its res5 is in the head, before a norm
    inside = {"backbone.bottom_up.": "", "backbone.res": "res", "backbone.stem.": "stem.", "roi_heads.res5.": "res5."}
    places: dict[str, str] = {}
    for name in own:
        start = next((start for start in inside if name.startswith(start)), None)
        if start is not None and not name.endswith("num_batches_tracked") and ".res5.norm." not in name:
            places[inside[start] + name.removeprefix(start)] = name
    wrong = [name for name in given if name in places and own[places[name]].shape != given[name].shape]
    lacking, left = sorted(places.keys() - given), sorted(given.keys() - places.keys())
    if wrong or lacking or left or not given:
        reason = "; ".join(
            f"{what}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
            for what, names in (("not in the encoder", lacking), ("without a place", left), ("of another shape", wrong))
            if names
        )
        raise InputError(f"{source}: does not fill the detector's backbone exactly ({reason}); give another")
    with torch.no_grad():
        for name, place in places.items():
            own[place].copy_(given[name])
    return sorted(places.values())
