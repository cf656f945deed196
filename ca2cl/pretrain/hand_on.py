"""Write the finished encoder into the run's folder and register it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ca2cl import config as settings
from ca2cl.common.console.summary import closing
from ca2cl.common.files import writing
from ca2cl.data.fingerprints.seen import Seen, merged, write_seen
from ca2cl.data.fingerprints.survey import see
from ca2cl.data.remote.reader import ShardReader
from ca2cl.data.shards.index import Manifest, ShardIndex
from ca2cl.errors import InputError
from ca2cl.methods.base import Method
from ca2cl.models.backbone import Backbone
from ca2cl.models.encoder_card import EncoderCard
from ca2cl.models.encoder_io import save_encoder
from ca2cl.pretrain.callbacks import RunObserver
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.pretrain.description import describe_run
from ca2cl.pretrain.watch.best import BEST_PATH
from ca2cl.runtime.tensor_files import write_tensors
from ca2cl.tracking.environment import git_commit
from ca2cl.tracking.run import NullTracker
from ca2cl.training.engine import AccelerateEngine

logger = logging.getLogger(__name__)


def hand_on(
    config: PretrainConfig,
    engine: AccelerateEngine,
    method: Method,
    reader: ShardReader,
    index: ShardIndex,
    provenance: Mapping[str, Any],
    earlier: Sequence[Seen | None],
    tracker: NullTracker,
    observer: RunObserver,
    step: int,
    best: Path | None = None,
) -> None:
    """Rank 0 writes and registers the encoder, with averaged weights if the run averaged them. Every rank calls it.

    Args:
        config: the job's.
        engine: holds the network.
        method: knows its encoder.
        reader: of the tiles.
        index: of the tiles.
        provenance: fields of the card that tell where the first weights and the teacher come from.
        earlier: tiles that these were trained on.
        tracker: the run.
        observer: draws the last figures, of the same weights.
        step: optimizer steps done.
        best: folder of the best encoder that the run watched, which is registered before the last one.
    """
    with engine.averaged():
        encoder = method.encoder(engine.bare)
        weights = engine.weights(encoder)
        if not engine.accelerator.is_main_process:
            write_tensors(None, weights)
            return
        observer.figures(engine)
        tracker.await_run()
        card = card_of(config, encoder, index.manifest, provenance, observer, step)
        folder = Path(config.run.output_dir) / "encoder"
        with writing(folder, "free some space and start again: the last step's checkpoint is kept"):
            folder.mkdir(parents=True, exist_ok=True)
            seen = _seen(index, reader, config.data.workers, earlier)
            for place in (folder, *([best] if best is not None else [])):
                write_seen(place, seen)
            save_encoder(folder, weights, card)
    if best is not None:
        tracker.log_encoder(best, config.tracking.register_as, alias=BEST_PATH)
    tracker.log_encoder(folder, config.tracking.register_as)
    if tracker.run_id:
        tracker.describe(describe_run(config, index.manifest, step, provenance.get("start"), tracker.run_id))
    logger.info("encoder in %s, run id %s", folder, tracker.run_id or "not known yet")


def say_next(config: PretrainConfig, steps: int) -> str:
    """The last lines of a run of ``steps`` steps: its encoder, and commands that go on with it."""
    folder = config.run.output_dir
    report, sets = ["ca2cl", "report", folder, "report.html"], ["--train", "LABELLED_SHARDS", "--test", "TEST_SHARDS"]
    made = f"an encoder, {config.model.arch} after {steps} steps"
    return closing(made, Path(folder) / "encoder", ["ca2cl", "probe", "--encoder", folder, *sets], report).rstrip()


def _seen(index: ShardIndex, reader: ShardReader, workers: int, earlier: Sequence[Seen | None]) -> Seen | None:
    """What the encoder and its first weights have seen. A shard that is away by now does not cost the encoder."""
    own = None
    try:
        own = see(index, reader, workers=workers)
    except InputError as error:
        logger.warning("%s; evaluations of the encoder will not know which tiles it has seen", error)
    return merged([*earlier, own])


def card_of(
    config: PretrainConfig,
    encoder: Backbone,
    manifest: Manifest,
    provenance: Mapping[str, Any],
    observer: RunObserver,
    step: int,
) -> EncoderCard:
    """The card of the run's encoder after ``step`` optimizer steps; the other arguments are those of ``hand_on``."""
    mean, std = config.model.normalisation
    return EncoderCard(
        arch=config.model.arch,
        feature_dim=encoder.feature_dim,
        input_size=config.data.image_size,
        mean=mean,
        std=std,
        pooling=config.model.pooling,
        manifest_digest=manifest.digest,
        classes=tuple(manifest.classes),
        config_digest=settings.digest(config),
        commit=git_commit(),
        step=step,
        weights="last" if config.optim.ema is None else f"ema {config.optim.ema:g}",
        metrics={**observer.last_metrics, **observer.last_watch},
        source_run_id=observer.tracker.run_id or None,
        **provenance,
    )
