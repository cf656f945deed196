"""Made-up tissue, an encoder and interruptions for the tests of ``ca2cl embed``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import torch

from ca2cl.config import IMAGENET_MEAN, IMAGENET_STD, TrackingConfig
from ca2cl.data.shards.config import ShardConfig
from ca2cl.data.shards.index import ShardIndex
from ca2cl.data.shards.run import run as shard
from ca2cl.data.synthetic.tissue import write_tissue
from ca2cl.evaluation.embed.config import EmbedConfig
from ca2cl.evaluation.embed.parts import Parts
from ca2cl.evaluation.embed.run import run
from ca2cl.models.backbone import build_encoder
from ca2cl.models.encoder_io import EncoderCard, save_encoder

SOURCE_RUN = "0123456789abcdef0123456789abcdef"
SIZE, TILES, PART = 32, 36, 10


def make_tissue(root: Path) -> Path:
    """Class folders, shards of them, and an encoder's folder."""
    write_tissue(root / "tiles", TILES // 9, size=48, seed=0)
    assert shard(ShardConfig(source=str(root / "tiles"), out=str(root / "shards"), samples_per_shard=8, workers=1)) == 0
    torch.manual_seed(5)
    write_encoder(root / "encoder")
    return root


def write_encoder(folder: Path, factor: float = 1.0) -> None:
    state = {name: tensor * factor for name, tensor in build_encoder("resnet18").state_dict().items()}
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    card = EncoderCard(arch="resnet18", feature_dim=512, input_size=SIZE, mean=mean, std=std, source_run_id=SOURCE_RUN)
    save_encoder(folder, state, card)


def config(tissue: Path, out: Path, /, **changes: Any) -> EmbedConfig:
    settings: dict[str, Any] = {
        "encoder": str(tissue / "encoder"),
        "source": str(tissue / "shards"),
        "out": str(out),
        "batch_size": 4,
        "part_size": PART,
        "workers": 0,
        "device": "cpu",
        "tracking": TrackingConfig(root=str(tissue / "runs")),
    }
    return EmbedConfig(**{**settings, **changes})


def vectors(path: Path) -> npt.NDArray[np.float32]:
    column = pq.read_table(path).column("vector").combine_chunks()
    return np.asarray(column.flatten()).reshape(len(column), -1)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def damage(tissue: Path, target: Path, samples: tuple[int, ...]) -> tuple[str, list[str]]:
    """A copy of the shards in which these samples do not decode; its path and the samples' keys."""
    shutil.copytree(tissue / "shards", target)
    index, keys = ShardIndex(target), []
    for sample in samples:
        shard, row = index.locate(sample)
        held, tar = index.samples(shard), target / index.shards[shard].name
        content = bytearray(tar.read_bytes())
        content[int(held.offset[row]) : int(held.offset[row]) + 16] = bytes(16)
        tar.write_bytes(content)
        keys.append(held.key[row])
    return str(target), keys


class Stop(Exception):
    """A kill, as far as files can tell."""


def interrupt(monkeypatch: pytest.MonkeyPatch, settings: EmbedConfig, after: int) -> Path:
    """Run until ``after`` parts are written; the parts' folder."""
    write, done = Parts.write, list[int]()

    def write_some(self: Parts, part: Any, *rest: Any) -> None:
        if len(done) == after:
            raise Stop
        done.append(part.number)
        write(self, part, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Parts, "write", write_some)
        with pytest.raises(Stop):
            run(settings)
    assert not Path(settings.out).exists()
    return Path(f"{settings.out}.parts")
