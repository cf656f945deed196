"""Disk space and time that a reproduction takes, for ``--plan``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ca2cl.common.records import read_fields
from ca2cl.common.tables import duration
from ca2cl.data.shards.index import MANIFEST_NAME
from ca2cl.errors import InputError
from ca2cl.evaluation.finetune.config import Trains
from ca2cl.evaluation.finetune.original import epochs_of, settled
from ca2cl.models.backbone import DEFAULT_ARCH, build_encoder
from ca2cl.reproduce.config import NctConfig, tuning
from ca2cl.reproduce.datasets import DRAWN, made_up
from ca2cl.runtime.device import find_device
from ca2cl.runtime.precision import seconds_of

_TILES = {"NCT-CRC-HE-100K": 100_000, "NCT-CRC-HE-100K-NONORM": 100_000, "CRC-VAL-HE-7K": 7_180}
_SIDE, _CLASSES = 224, 9
_BATCH = 8
_BACKWARD = 3.0
"""Time of a training pass by that of a forward pass."""
MEASURED = f"times: estimated from a {DEFAULT_ARCH}'s on {{device}} as busy as it is now, in one process\n"


@dataclass(frozen=True)
class Cost:
    """What the steps of a job need."""

    config: NctConfig
    device: str
    seconds: float
    """Of a tile's forward pass."""

    def tiles(self, name: str) -> int:
        """Tiles of a set."""
        manifest = self.config.shards(name) / MANIFEST_NAME
        try:
            return int(read_fields(manifest, ("samples",), "")["samples"])
        except InputError:  # not there yet
            if self.config.miniature or made_up(Path(self.config.data)):
                return _CLASSES * DRAWN["train" if name == self.config.train_set else "test"][0]
            return _TILES[name]

    def space(self, name: str) -> str:
        """Space of a set's tiles, or of its shards, which hold the same bytes."""
        return f"{self.tiles(name) * 3 * _side(self.config) ** 2 / 1e9:.2f} GB"

    def vectors(self, name: str) -> tuple[str, str]:
        """Space and time of a set's vectors."""
        return f"{self.tiles(name) * 512 * 4 / 1e9:.2f} GB", duration(self.tiles(name) * self.seconds)

    def cells(self, trains: Trains, left: int, of: int) -> str:
        """Time of the fine-tuning cells that are left: their passes over labelled tiles, and the last one's over the
        test set."""
        config, tiles = settled(tuning(self.config, trains)), self.tiles(self.config.train_set)
        passes = 0.0
        for budget in config.labels:
            labelled = min(tiles, budget * (tiles if budget <= 1 else _CLASSES))
            passes += max(epochs_of(config, budget) * labelled, config.min_steps * config.batch_size)
        backward = _BACKWARD if trains == "all" else 1.0
        whole = of / len(config.labels) * passes * backward + of * self.tiles(self.config.sets[1])
        return duration(left / of * whole * self.seconds)


def measure(config: NctConfig) -> Cost:
    """The cost on this machine, whose speed takes some seconds to find."""
    device = find_device("auto")
    side = config.image_size or _side(config)
    body = build_encoder(DEFAULT_ARCH).to(device).eval()
    tiles = torch.zeros(_BATCH, 3, side, side, device=device)

    def once() -> None:
        with torch.inference_mode():
            body(tiles).sum().item()

    return Cost(config, device.type, seconds_of(once) / _BATCH)


def _side(config: NctConfig) -> int:
    return 64 if config.miniature or made_up(Path(config.data)) else _SIDE
