"""A run's folder and its record in a store, without the training."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch

from ca2cl.config import IMAGENET_MEAN, IMAGENET_STD, DataConfig, RunConfig, TrackingConfig
from ca2cl.data.shards.index import ShardIndex
from ca2cl.models.backbone import build_encoder
from ca2cl.models.encoder_io import EncoderCard, save_encoder
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.tracking.run import RunTracker, open_run

SIZE, NAME = 32, "report-encoder"
"""Pixels of the runs' tiles, and the registered model in their settings."""


def write_run(folder: Path, root: str, shards: Path, *, name: str = "crc", encoder: bool = True) -> RunTracker:
    """A run of four steps with given numbers and a real encoder, left open."""
    tracking = TrackingConfig(root=root, run_name=name, register_as=NAME)
    config = PretrainConfig(
        data=DataConfig(shards=str(shards), image_size=SIZE, lanes=8), tracking=tracking,
        run=RunConfig(batch_size=16, steps=4, output_dir=str(folder)),
    )  # fmt: skip
    tracker = open_run(folder, config, manifest=dataclasses.asdict(ShardIndex(shards).manifest))
    for step in range(1, 5):
        loss = math.nan if step == 2 else 8 / step
        tracker.log_step(
            {"step": step, "samples": 16 * step, "loss": loss, "nt_xent": 4 / step, "cluster": 1.5, "lr": 0.1 / step,
             "grad_norm": 2.0, "tiles_per_s": 30.0, "data_wait_s": 0.01, "bad_samples": step}
        )  # fmt: skip
    if encoder:
        torch.manual_seed(5)
        card = EncoderCard(
            arch="resnet18", feature_dim=512, input_size=SIZE, mean=IMAGENET_MEAN, std=IMAGENET_STD,
            source_run_id=tracker.run_id,
        )  # fmt: skip
        save_encoder(folder / "encoder", build_encoder("resnet18").state_dict(), card)
    return tracker
