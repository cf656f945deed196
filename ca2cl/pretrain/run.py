"""``ca2cl pretrain``: build and run a pre-training job on every process."""

from __future__ import annotations

import dataclasses
import logging
import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import broadcast_object_list

from ca2cl import config as settings
from ca2cl.common.files import writing
from ca2cl.data.loading.order import LaneOrder
from ca2cl.data.loading.stream import BadBudget, LaneStream
from ca2cl.data.remote.download import FetchPolicy
from ca2cl.data.remote.reader import ShardReader, is_remote, open_index
from ca2cl.data.shards.index import ShardIndex
from ca2cl.errors import InputError
from ca2cl.methods.base import Method, MethodSettings
from ca2cl.methods.bitwise import Bitwise
from ca2cl.methods.registry import build_method
from ca2cl.models.backbone import Backbone, build_encoder, check_arch, has_batch_norm
from ca2cl.models.bn_groups import LaneGroups
from ca2cl.models.encoder_io import EncoderCard, save_encoder, weights_digest
from ca2cl.pretrain import shares
from ca2cl.pretrain.batches import feed
from ca2cl.pretrain.callbacks import RunObserver
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.pretrain.engines import build_engine, check_fsdp
from ca2cl.pretrain.held_memory import held_of
from ca2cl.pretrain.memory import bytes_a_tile, check_memory, limit_left
from ca2cl.pretrain.numerics import check_numerics, choose_kernels, fix_numerics
from ca2cl.pretrain.resume import is_finished
from ca2cl.registry.resolve import resolve_encoder
from ca2cl.runtime.accelerator import build_accelerator
from ca2cl.runtime.distributed import Ranks
from ca2cl.runtime.launched import find_place
from ca2cl.runtime.precision import HALF, check_precision
from ca2cl.runtime.signals import StopFlag
from ca2cl.runtime.tensor_files import write_tensors
from ca2cl.tracking.environment import git_commit
from ca2cl.tracking.run import NullTracker, Status, hold_run, open_run
from ca2cl.training.checkpoint import Checkpointer, read_state, restore
from ca2cl.training.engine import AccelerateEngine
from ca2cl.training.loop import Progress, TrainJob, train
from ca2cl.training.schedule import learning_rate
from ca2cl.views.batch import VERSION
from ca2cl.views.build import build_views

logger = logging.getLogger(__name__)


def run(config: PretrainConfig) -> int:
    """Train, register the encoder, and return the exit code: 0, or 85 after a signal and a checkpoint, 130 after
    Ctrl-C and one.

    Raises:
        InputError: the configuration, the data or the folder cannot be used.
    """
    _check(config)
    method = _method(config)
    stop = StopFlag().install()
    with stop.joining():
        accelerator = build_accelerator()
    world = accelerator.num_processes
    policy = FetchPolicy(timeout=config.data.fetch_timeout)
    ranks = Ranks()
    numerics = _fix_numerics(config, accelerator, ranks)
    index = ranks.together(lambda: open_index(config.data.shards, config.data.cache_dir, policy))
    order = _order(config, index, world, method)
    _warn_of_a_small_cache(config, index, world)
    micro_batch = shares.micro_batch(config, world)
    shares.check_accumulation(config, method, world, micro_batch)
    check_fsdp(config, world, micro_batch)
    groups = shares.lane_groups(config, world, micro_batch)
    steps = config.run.steps or (config.run.epochs or 0) * order.steps_per_epoch

    ranks.together(lambda: _check_needs(config, method, accelerator, micro_batch))
    encoder, earlier_manifests = ranks.together(lambda: _initial_encoder(config))
    weights = weights_digest(encoder, config.model.mean, config.model.std)
    engine = build_engine(config, accelerator, method.build(encoder), micro_batch)
    checkpointer = Checkpointer(
        Path(config.run.output_dir) / "checkpoints", config.run.keep_last, config.run.keep_every
    )
    with ExitStack() as start:
        lock = ranks.together(
            lambda: start.enter_context(hold_run(config.run.output_dir)) if accelerator.is_main_process else None
        )
        if ranks.from_first(lambda: is_finished(config, steps, order.steps_per_epoch, index.manifest.digest, weights)):
            stop.over()
            accelerator.end_training()
            return 0
        checkpoint = _checkpoint_to_resume(config, checkpointer, ranks)
        progress = Progress()
        if checkpoint is not None:
            progress = _resume(config, checkpoint, engine, index.manifest.digest, groups, numerics, ranks)
        _check_progress(progress, steps)
        tracker = _open_tracker(config, accelerator, progress, dataclasses.asdict(index.manifest), lock)
        _name_origin(tracker, checkpoint)
    parts = _Parts(
        engine, method, index, order, groups, checkpointer, stop, tracker, earlier_manifests, weights, numerics
    )
    done = _train_tracked(config, parts, progress, steps, micro_batch)
    # A launcher ends all processes as soon as one exits with another code than 0; rank 0 must be done by then.
    accelerator.wait_for_everyone()
    stop.over()
    accelerator.end_training()
    return 0 if done else stop.exit_code


@dataclass(frozen=True)
class _Parts:
    """Components of a job."""

    engine: AccelerateEngine
    method: Method
    index: ShardIndex
    order: LaneOrder
    groups: LaneGroups | None
    checkpointer: Checkpointer
    stop: StopFlag
    tracker: NullTracker
    earlier_manifests: tuple[str, ...]
    """Tiles that the first weights were trained on."""
    start_weights: str
    """Digest of the weights that the run began with."""
    numerics: dict[str, str] | None
    """What the last bit depends on, under ``run.accumulation bitwise``."""


def _train_tracked(config: PretrainConfig, parts: _Parts, progress: Progress, steps: int, micro_batch: int) -> bool:
    """``_train``; the tracker is closed with the run's status in any case."""
    status: Status = "FAILED"
    try:
        done = _train(config, parts, progress, steps, micro_batch)
        status = "FINISHED" if done else "KILLED"
        return done
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        parts.tracker.finish(status)


def _train(config: PretrainConfig, parts: _Parts, progress: Progress, steps: int, micro_batch: int) -> bool:
    """Train and hand on the encoder. Returns False if a signal ended the run early."""
    engine, method, index, order, tracker = parts.engine, parts.method, parts.index, parts.order, parts.tracker
    accelerator = engine.accelerator
    reader = ShardReader(
        config.data.shards, config.data.cache_dir, index=index, cache_gb=config.data.cache_gb,
        policy=FetchPolicy(timeout=config.data.fetch_timeout),
    )  # fmt: skip
    stream = LaneStream(
        index, order, reader, rank=accelerator.process_index, world=accelerator.num_processes,
        workers=config.data.workers, start_step=progress.step, stop_step=steps,
    )  # fmt: skip
    views = build_views(
        config.views, config.data.image_size, mean=config.model.mean, std=config.model.std, seed=config.run.seed,
        dtype=_views_dtype(config),
    )  # fmt: skip
    budget = BadBudget(config.data.max_bad_rate)
    state = {
        "run_id": tracker.run_id,
        "config_digest": settings.digest(config),
        "manifest_digest": index.manifest.digest,
        "resume": config.run.resume,
        "start_weights": parts.start_weights,
        "norm_block": config.model.norm_block,
        "numerics": parts.numerics,
        "views": VERSION,
    }
    observer = RunObserver(tracker, config, method, index, reader, order, steps, state)
    run, per_epoch = config.run, order.steps_per_epoch
    bitwise = Bitwise(method, parts.groups.block) if run.accumulation == "bitwise" and parts.groups else None
    job = TrainJob(
        engine=engine, method=bitwise or method,
        data=feed(stream, lambda tiles: method.views(tiles, views), engine.device, micro_batch, parts.groups),
        observer=observer, checkpointer=parts.checkpointer, stop=parts.stop, state=state, check_bad=budget.check,
        batch_size=run.batch_size, total_steps=steps, steps_per_epoch=per_epoch,
        rate=lambda step: learning_rate(config.optim, step, steps, per_epoch), clip_norm=config.optim.clip_norm,
        checkpoint_every=run.checkpoint_every, log_every=run.log_every, max_skipped=run.max_skipped,
        read_late=engine.device.type == "cuda" and type(method).after_step is Method.after_step,
    )  # fmt: skip
    try:
        done = train(job, progress)
        if done:
            _hand_on(config, parts, observer, progress)
    finally:
        observer.close()
    return done


def _views_dtype(config: PretrainConfig) -> torch.dtype:
    """The precision to which autocast rounds the network's input; fp32 for the sums of ``bitwise``."""
    run = config.run
    return HALF.get(run.precision, torch.float32) if run.accumulation != "bitwise" else torch.float32


def _check(config: PretrainConfig) -> None:
    run = config.run
    if not config.data.shards:
        raise InputError("data.shards is not set: give the folder that `ca2cl shard` wrote, --data.shards FOLDER")
    if not run.output_dir:
        raise InputError("run.output_dir is not set: give a folder for the run, --run.output_dir FOLDER")
    if (run.epochs is None) == (run.steps is None):
        raise InputError(f"run.epochs is {run.epochs} and run.steps is {run.steps}: give exactly one of them")
    check_arch(config.model.arch)


def _method(config: PretrainConfig) -> Method:
    accumulation: Literal["exact", "plain"] = "plain" if config.run.accumulation == "plain" else "exact"
    settings = MethodSettings(config.objective, config.model.projection_dim, accumulation)
    method = build_method(config.method.name, settings, config.method.options)
    shares.check_least(config, method)
    return method


def _fix_numerics(config: PretrainConfig, accelerator: Any, ranks: Ranks) -> dict[str, str] | None:
    """Numerics that ``bitwise`` depends on, checked to be equal on all ranks; None for other accumulations."""
    numerics = None
    if config.run.accumulation == "bitwise":
        numerics = {**fix_numerics(accelerator.device), "views": str(VERSION)}
    else:
        choose_kernels(accelerator.device, tf32=config.run.tf32)
    for rank, there in enumerate(ranks.share(numerics)):
        check_numerics(numerics or {}, there or {}, f"on rank {rank}")
    return numerics


def _order(config: PretrainConfig, index: ShardIndex, world: int, method: Method) -> LaneOrder:
    run = config.run
    order = LaneOrder(
        index, config.data.lanes, run.batch_size, run.seed, world=world, least=method.least_tiles,
        fewer=lambda tiles: method.too_few(tiles)[1],
    )  # fmt: skip
    order.check_world(world)
    return order


def _warn_of_a_small_cache(config: PretrainConfig, index: ShardIndex, world: int) -> None:
    """Warn if the cache cannot hold one shard for each lane: every batch would then download shards again."""
    data = config.data
    lanes = data.lanes * find_place().local_world // world
    stood_in = min(lanes, len(index.shards)) * index.manifest.bytes / len(index.shards) / 1e9
    if is_remote(data.shards) and data.cache_gb is not None and data.cache_gb < stood_in:
        logger.warning(
            "data.cache_gb is %g: the %d lanes of this machine stand in shards of %.3g GB together, which will be "
            "fetched again and again; use at least --data.cache_gb %.3g", data.cache_gb, lanes, stood_in, 2 * stood_in,
        )  # fmt: skip


def _check_needs(config: PretrainConfig, method: Method, accelerator: Any, micro_batch: int) -> None:
    """Check that precision and memory allow a step on this machine."""
    run = config.run
    check_precision(run.precision, accelerator.device, "run.precision")
    if accelerator.is_local_main_process or accelerator.device.type == "cuda":
        limit = limit_left() if accelerator.device.type == "cpu" else math.inf
        a_tile = bytes_a_tile(method.build, config.model.arch, config.data.image_size, run.precision)
        share = run.batch_size // accelerator.num_processes
        held = held_of(config, method.build, accelerator)
        check_memory(a_tile, micro_batch, share, accelerator.device, held, limit, sharded=run.fsdp)


def _initial_encoder(config: PretrainConfig) -> tuple[Backbone, tuple[str, ...]]:
    """The initial encoder, equal on all ranks, and the manifests that its weights were trained on."""
    model = config.model
    torch.manual_seed(config.run.seed)
    encoder = build_encoder(
        model.arch, model.norm, group=model.norm_group, image_size=config.data.image_size, identity_blocks=True,
        pooling=model.pooling,
    )  # fmt: skip
    if not has_batch_norm(encoder) and find_place().rank == 0:
        logger.info("model.norm %s changes nothing: %s has no BatchNorm", model.norm, model.arch)
    if model.weights != "random":
        given = resolve_encoder(
            model.weights, tracking_uri=config.tracking.uri, root=config.tracking.root, arch=model.arch
        )
        if given.card.arch != model.arch:
            raise InputError(f"model.weights {model.weights!r} is a {given.card.arch}: set model.arch to that")
        encoder.load_state_dict(encoder.fitted(given.encoder.state_dict()))
        return encoder, given.card.manifests
    return encoder, ()


def _checkpoint_to_resume(config: PretrainConfig, checkpointer: Checkpointer, ranks: Ranks) -> Path | None:
    """The checkpoint that rank 0 finds. A file server may still show other nodes an older state of the folder."""
    found = ranks.from_first(lambda: checkpointer.to_resume(config.run.resume))
    none = config.run.resume == "never" or checkpointer.newest() is None
    alike = found.is_dir() if found is not None else none
    for rank, same in enumerate(ranks.share(alike)):
        if not same:
            raise InputError(
                f"run.output_dir: rank {rank} does not see the checkpoints that rank 0 does ({found or 'none'}); it "
                "must be one folder that all of them see"
            )
    return found


def _resume(
    config: PretrainConfig,
    checkpoint: Path,
    engine: AccelerateEngine,
    manifest_digest: str,
    groups: LaneGroups | None,
    numerics: dict[str, str] | None,
    ranks: Ranks,
) -> Progress:
    def read() -> Progress:
        state = read_state(checkpoint)
        if state.get("manifest_digest") != manifest_digest:
            raise InputError(f"{checkpoint}: was trained on other shards; use those, or begin a new run")
        shares.check_resume(config, groups, state)
        if state.get("views", 1) != VERSION:
            logger.warning(
                "%s: was trained on views of version %s; it continues with version %d, whose views differ a little",
                checkpoint, state.get("views", 1), VERSION,
            )  # fmt: skip
        saved = state.get("numerics")
        if numerics and isinstance(saved, dict):
            check_numerics(numerics, saved, f"in {checkpoint}")
        return Progress.of(checkpoint)

    progress = ranks.together(read)
    restore(checkpoint, engine)
    logger.info("going on from %s", checkpoint)
    return progress


def _check_progress(progress: Progress, steps: int) -> None:
    if progress.step > steps:
        raise InputError(
            f"run.steps is {steps}: the newest checkpoint is of step {progress.step}; ask for more, or use another "
            "run.output_dir"
        )


def _open_tracker(
    config: PretrainConfig, accelerator: Any, progress: Progress, manifest: dict[str, Any], lock: ExitStack | None
) -> NullTracker:
    """Open the run on rank 0 and broadcast its id, or the error, which every rank then raises."""
    tracker, answer = NullTracker(), ["", ""]
    if accelerator.is_main_process:
        try:
            tracker = open_run(
                config.run.output_dir, config, resume=config.run.resume != "never", step=progress.step,
                manifest=manifest, held=lock,
            )  # fmt: skip
            answer = [tracker.run_id, ""]
        except InputError as error:
            answer = ["", str(error)]
    answer = broadcast_object_list(answer)
    if answer[1]:
        raise InputError(answer[1])
    if not accelerator.is_main_process:
        tracker.run_id = answer[0]
    return tracker


def _name_origin(tracker: NullTracker, checkpoint: Path | None) -> None:
    """Tag the run with the checkpoint of another run that it was forked from."""
    state = read_state(checkpoint) if checkpoint is not None else {}
    if state.get("run_id") and tracker.run_id and state["run_id"] != tracker.run_id:
        tracker.set_tag("ca2cl.begun_from", f"{state['run_id']} step {state['step']}")


def _hand_on(config: PretrainConfig, parts: _Parts, observer: RunObserver, progress: Progress) -> None:
    """Write the finished encoder into the run's folder and register it."""
    engine, tracker, manifest = parts.engine, parts.tracker, parts.index.manifest
    encoder = parts.method.encoder(engine.bare)
    weights = engine.weights(encoder)
    if not engine.accelerator.is_main_process:
        write_tensors(None, weights)
        return
    observer.figures(engine)
    card = EncoderCard(
        arch=config.model.arch,
        feature_dim=encoder.feature_dim,
        input_size=config.data.image_size,
        mean=config.model.mean,
        std=config.model.std,
        pooling=config.model.pooling,
        manifest_digest=manifest.digest,
        earlier_manifests=parts.earlier_manifests,
        classes=tuple(manifest.classes),
        config_digest=settings.digest(config),
        commit=git_commit(),
        step=progress.step,
        metrics=observer.last_metrics,
        source_run_id=tracker.run_id or None,
    )
    folder = Path(config.run.output_dir) / "encoder"
    with writing(folder, "free some space and start again: the last step's checkpoint is kept"):
        save_encoder(folder, weights, card)
    tracker.log_encoder(folder, config.tracking.register_as)
    logger.info("encoder in %s, run id %s", folder, tracker.run_id or "not known yet")
