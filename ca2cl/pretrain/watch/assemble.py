"""Build the watch of a job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ca2cl.config import DataConfig, ModelConfig, ObjectiveConfig, RunConfig, ViewsConfig
from ca2cl.data.remote.reader import ShardReader
from ca2cl.data.transfer.download import FetchPolicy
from ca2cl.errors import InputError
from ca2cl.methods.base import Method
from ca2cl.models.backbone import Backbone
from ca2cl.models.encoder_card import EncoderCard
from ca2cl.pretrain.watch.best import BestEncoder
from ca2cl.pretrain.watch.config import WatchConfig
from ca2cl.pretrain.watch.held_out import OwnTiles, WatchedTiles
from ca2cl.pretrain.watch.passes import Passes
from ca2cl.pretrain.watch.state import WatchState
from ca2cl.pretrain.watch.watch import Centroids, Parts, Report, Watch, metric_of
from ca2cl.runtime.distributed import Ranks
from ca2cl.runtime.precision import HALF
from ca2cl.training.checkpoint import read_state
from ca2cl.views.build import build_views


class Settings(Protocol):
    """Settings of the job that the watch depends on."""

    @property
    def watch(self) -> WatchConfig:
        """Its own."""

    @property
    def data(self) -> DataConfig:
        """Side of the input, and how shards are read."""

    @property
    def model(self) -> ModelConfig:
        """Mean and standard deviation of the input."""

    @property
    def views(self) -> ViewsConfig:
        """The two views of alignment."""

    @property
    def objective(self) -> ObjectiveConfig:
        """Settings of k-means."""

    @property
    def run(self) -> RunConfig:
        """Precision and folder."""


def check(settings: Settings) -> None:
    """Check that the job can watch.

    Raises:
        InputError: it cannot.
    """
    if settings.watch.shards and settings.run.fsdp:
        raise InputError(
            "run.fsdp is true: a watch passes tiles through the encoder alone, which is then cut in parts; leave "
            "watch.shards out, or use DistributedDataParallel, ZeRO-1 or ZeRO-2"
        )


def open_watch(
    settings: Settings,
    tiles: WatchedTiles,
    method: Method,
    ranks: Ranks,
    report: Report,
    card: Callable[[Backbone, int], EncoderCard],
    state: dict[str, Any],
    checkpoint: Path | None,
    total_steps: int,
) -> Watch:
    """The watch of a job. Every rank calls it.

    Args:
        settings: of the job.
        tiles: that are watched.
        method: knows its encoder.
        ranks: of the job.
        report: receives the numbers.
        card: makes the card of the best encoder, from itself and its step.
        state: what every checkpoint carries.
        checkpoint: of this run, which it goes on from; None: it begins.
        total_steps: of the run.

    Raises:
        InputError: the tiles cannot be read, or the best encoder of the checkpoint cannot be written.
    """
    data, watch = settings.data, settings.watch
    mean, std = settings.model.normalisation
    views = build_views(settings.views, data.image_size, mean=mean, std=std, seed=watch.seed)
    own = _own(data, watch.shards, tiles, ranks)
    others = tiles.reference
    reference = _own(data, watch.labelled or data.shards, others, ranks) if others is not None else None
    digests = (tiles.index.manifest.digest, others.index.manifest.digest if others is not None else "")
    words = (*digests, len(tiles), watch.seed, data.image_size, metric_of(watch, tiles))
    so_far = WatchState.of(read_state(checkpoint) if checkpoint is not None else {}, " ".join(map(str, words)))
    best = BestEncoder(Path(settings.run.output_dir))
    ranks.from_first(lambda: best.restore(so_far, checkpoint))
    passes = Passes(data.image_size, mean, std, views, tiles.words_N, HALF.get(settings.run.precision))
    centroids = Centroids(settings.objective.clusters, settings.objective.lloyd_iterations)
    parts = Parts(
        method=method, passes=passes, own=own, reference=reference, centroids=centroids, ranks=ranks,
        report=report, card=card, best=best, state=state, total_steps=total_steps,
    )  # fmt: skip
    return Watch(watch, tiles, parts, so_far)


def _own(data: DataConfig, shards: str, tiles: WatchedTiles, ranks: Ranks) -> OwnTiles:
    policy = FetchPolicy(timeout=data.fetch_timeout)
    reader = ShardReader(shards, data.cache_dir, index=tiles.index, cache_gb=data.cache_gb, policy=policy)
    return OwnTiles(tiles, reader, tiles.blocks(ranks.rank, ranks.world), data.workers)
