"""``ca2cl pretrain``: build and run a pre-training job on every process."""

from __future__ import annotations

import dataclasses
import logging
import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from ca2cl import config as settings
from ca2cl.data.fingerprints.seen import Seen
from ca2cl.data.loading.order import LaneOrder
from ca2cl.data.loading.stream import BadBudget, LaneStream
from ca2cl.data.remote.reader import ShardReader, open_index
from ca2cl.data.shards.index import ShardIndex
from ca2cl.data.transfer.download import FetchPolicy
from ca2cl.errors import InputError
from ca2cl.methods.base import Method
from ca2cl.methods.bitwise import Bitwise
from ca2cl.models.backbone import Backbone, check_arch, outline
from ca2cl.models.bn_groups import LaneGroups
from ca2cl.models.encoder_io import EncoderCard, weights_digest
from ca2cl.pretrain import shares
from ca2cl.pretrain.batches import feed, maker
from ca2cl.pretrain.callbacks import RunObserver
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.pretrain.description import describe_run
from ca2cl.pretrain.engines import build_engine, check_fsdp, configured_method, sharing
from ca2cl.pretrain.hand_on import card_of, hand_on, say_next
from ca2cl.pretrain.memory.activations import quick_step
from ca2cl.pretrain.memory.check import check_memory
from ca2cl.pretrain.memory.held import held_bytes
from ca2cl.pretrain.memory.machine import limit_left
from ca2cl.pretrain.numerics import check_numerics, choose_kernels, fix_numerics, views_dtype
from ca2cl.pretrain.resume import check_progress, is_finished, name_origin
from ca2cl.pretrain.sampling import sample_order, warn_of_a_small_cache
from ca2cl.pretrain.start import RunStart, find_start, initial_encoder
from ca2cl.pretrain.teacher import FoundTeacher, find_teacher
from ca2cl.pretrain.watch import assemble as watching
from ca2cl.pretrain.watch.best import BestEncoder
from ca2cl.pretrain.watch.held_out import WatchedTiles, find_tiles
from ca2cl.pretrain.watch.watch import Watch
from ca2cl.runtime.accelerator import build_accelerator
from ca2cl.runtime.distributed import Ranks
from ca2cl.runtime.precision import check_precision
from ca2cl.runtime.signals import StopFlag
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
    method = _checked(config)
    stop = StopFlag().install()
    with stop.joining():
        accelerator = build_accelerator()
    world = accelerator.num_processes
    policy = FetchPolicy(timeout=config.data.fetch_timeout)
    ranks = Ranks()
    config, begun = ranks.together(lambda: find_start(config))
    numerics = _fix_numerics(config, accelerator, ranks)
    index = ranks.together(lambda: open_index(config.data.shards, config.data.cache_dir, policy))
    watched = ranks.together(lambda: _watched(config, index))
    order = sample_order(config, index, world, method)
    warn_of_a_small_cache(config, index, world)
    micro_batch = shares.micro_batch(config, world)
    shares.check_accumulation(config, method, world, micro_batch)
    check_fsdp(config, world, micro_batch)
    groups = shares.lane_groups(config, world, micro_batch)
    steps = config.run.steps or (config.run.epochs or 0) * order.steps_per_epoch
    teacher = find_teacher(config, method, accelerator.device, index, ranks, _unit(config, groups))
    ranks.together(lambda: _check_needs(config, method, teacher, accelerator, micro_batch))
    encoder = ranks.together(lambda: initial_encoder(config, begun))
    weights = weights_digest(encoder, *config.model.normalisation)
    origin = {"start_weights": weights, "teacher": teacher.identity if teacher is not None else None}
    engine = build_engine(config, accelerator, method, encoder, micro_batch)
    checkpointer = _checkpointer(config, watched)
    with ExitStack() as start:
        lock = ranks.together(
            lambda: start.enter_context(hold_run(config.run.output_dir)) if accelerator.is_main_process else None
        )
        if ranks.from_first(lambda: is_finished(config, steps, order.steps_per_epoch, index.manifest.digest, origin)):
            stop.over()
            accelerator.end_training()
            return 0
        checkpoint = _checkpoint_to_resume(config, checkpointer, ranks)
        progress = Progress()
        if checkpoint is not None:
            progress = _resume(config, checkpoint, engine, index.manifest.digest, groups, numerics, ranks)
        check_progress(progress, steps)
        tracker = _open_tracker(config, accelerator, progress, dataclasses.asdict(index.manifest), lock)
        _tag_start(tracker, checkpoint, begun, teacher)
        tracker.describe(describe_run(config, index.manifest, steps, begun.facts().get("start")))
    provenance = _provenance(begun, teacher)
    seen = (begun.seen, teacher.seen if teacher is not None else None)
    parts = _Parts(
        engine, method, index, order, groups, checkpointer, stop, tracker, provenance, seen, origin, numerics, ranks,
        watched, checkpoint,
    )  # fmt: skip
    done = _train_tracked(config, parts, progress, steps, micro_batch)
    # A launcher ends all processes as soon as one exits with another code than 0; rank 0 must be done by then.
    accelerator.wait_for_everyone()
    stop.over()
    accelerator.end_training()
    return 0 if done else stop.exit_code


def _checked(config: PretrainConfig) -> Method:
    """The method, after the checks that need nothing but the settings."""
    _check(config)
    method = configured_method(config)
    shares.check_least(config, method)
    return method


def _checkpointer(config: PretrainConfig, watched: WatchedTiles | None) -> Checkpointer:
    run, folder = config.run, Path(config.run.output_dir)
    best = BestEncoder(folder).weights if watched is not None else None
    return Checkpointer(folder / "checkpoints", run.keep_last, run.keep_every, best)


def _provenance(begun: RunStart, teacher: FoundTeacher | None) -> dict[str, Any]:
    """Fields of the encoder's card: where the first weights come from, and the tiles that they and the teacher saw."""
    earlier = (*begun.manifests, *(teacher.manifests if teacher is not None else ()))
    return {"earlier_manifests": earlier, **begun.facts()}


def _unit(config: PretrainConfig, groups: LaneGroups | None) -> int | None:
    """Rows that ``bitwise`` passes through a network at a time; None for other accumulations."""
    return groups.block if groups is not None and config.run.accumulation == "bitwise" else None


def _tag_start(tracker: NullTracker, checkpoint: Path | None, begun: RunStart, teacher: FoundTeacher | None) -> None:
    """Tag the run with the checkpoint or weights that it begins with, and its teacher."""
    tracker.set_tag("ca2cl.kind", "pretrain")
    name_origin(tracker, checkpoint)
    for name, value in begun.tags().items() if checkpoint is None else ():
        tracker.set_tag(name, value)
    if teacher is not None:
        tracker.set_tag("ca2cl.teacher", f"{teacher.uri}, {teacher.identity}")


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
    provenance: dict[str, Any]
    """Fields of the encoder's card: where the first weights come from, and the tiles that they and the teacher saw."""
    earlier: tuple[Seen | None, ...]
    """Tiles that these saw, where that was kept."""
    origin: dict[str, str | None]
    """Digests of the encoder that the run began with, and of its teacher."""
    numerics: dict[str, str] | None
    """What the last bit depends on, under ``run.accumulation bitwise``."""
    ranks: Ranks
    watched: WatchedTiles | None
    checkpoint: Path | None
    """The one that the training goes on from."""


def _train_tracked(config: PretrainConfig, parts: _Parts, progress: Progress, steps: int, micro_batch: int) -> bool:
    """``_train``; the tracker is closed with the run's status in any case."""
    status: Status = "FAILED"
    try:
        done = _train(config, parts, progress, steps, micro_batch)
        status = "FINISHED" if done else "KILLED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        parts.tracker.finish(status)
    if done and parts.engine.accelerator.is_main_process:
        logger.info("%s", say_next(config, steps))
    return done


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
    mean, std = config.model.normalisation
    views = build_views(
        config.views, config.data.image_size, mean=mean, std=std, seed=config.run.seed, dtype=views_dtype(config)
    )
    make = maker(method, views, words=config.model.drop_path > 0)
    budget = BadBudget(config.data.max_bad_rate)
    state = {
        "run_id": tracker.run_id,
        "config_digest": settings.digest(config),
        "manifest_digest": index.manifest.digest,
        "resume": config.run.resume,
        **parts.origin,
        "norm_block": config.model.norm_block,
        "numerics": parts.numerics,
        "views": VERSION,
    }
    observer = RunObserver(tracker, config, method, index, reader, order, steps, state, progress.step)
    watch = _open_watch(config, parts, observer, steps)
    run, per_epoch = config.run, order.steps_per_epoch
    bitwise = Bitwise(method, parts.groups.block) if run.accumulation == "bitwise" and parts.groups else None
    job = TrainJob(
        engine=engine, method=bitwise or method,
        data=feed(stream, make, engine.device, micro_batch, parts.groups),
        observer=observer, checkpointer=parts.checkpointer, stop=parts.stop, watch=watch, state=state,
        check_bad=budget.check,
        batch_size=run.batch_size, total_steps=steps, steps_per_epoch=per_epoch,
        rate=lambda step: learning_rate(config.optim, step, steps, per_epoch), clip_norm=config.optim.clip_norm,
        checkpoint_every=run.checkpoint_every, log_every=run.log_every, max_skipped=run.max_skipped,
        read_late=engine.device.type == "cuda" and type(method).after_step is Method.after_step,
    )  # fmt: skip
    try:
        done = train(job, progress)
        if done:
            observer.close()  # lines follow
            best = watch.best if watch is not None else None
            hand_on(
                config, engine, method, reader, index, parts.provenance, parts.earlier, tracker, observer,
                progress.step, best,
            )  # fmt: skip
    finally:
        observer.close()
    return done


def _watched(config: PretrainConfig, index: ShardIndex) -> WatchedTiles | None:
    watching.check(config)
    return find_tiles(config.watch, config.data.cache_dir, config.data.fetch_timeout, index)


def _open_watch(config: PretrainConfig, parts: _Parts, observer: RunObserver, steps: int) -> Watch | None:
    """The watch of the job, if it has one; that of another run's checkpoint does not go on."""
    if parts.watched is None:
        return None

    def card(encoder: Backbone, step: int) -> EncoderCard:
        return card_of(config, encoder, parts.index.manifest, parts.provenance, observer, step)

    own = parts.checkpoint if parts.checkpoint and parts.checkpoint.parent == parts.checkpointer.folder else None
    return watching.open_watch(
        config, parts.watched, parts.method, parts.ranks, observer, card, observer.state, own, steps
    )


def _check(config: PretrainConfig) -> None:
    run = config.run
    if not config.data.shards:
        raise InputError("data.shards is not set: give the folder that `ca2cl shard` wrote, --data.shards FOLDER")
    if not run.output_dir:
        raise InputError("run.output_dir is not set: give a folder for the run, --run.output_dir FOLDER")
    if (run.epochs is None) == (run.steps is None):
        raise InputError(f"run.epochs is {run.epochs} and run.steps is {run.steps}: give exactly one of them")
    check_arch(config.model.arch)
    if not config.model.weights:
        raise InputError(
            "model.weights is not set: this recipe continues from given weights; give them, --model.weights WEIGHTS"
        )


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


def _check_needs(
    config: PretrainConfig, method: Method, teacher: FoundTeacher | None, accelerator: Any, micro_batch: int
) -> None:
    """Check that precision and memory allow a step on this machine; a teacher's weights are on the device by now."""
    run = config.run
    check_precision(run.precision, accelerator.device, "run.precision")
    if accelerator.is_local_main_process or accelerator.device.type == "cuda":
        model, share = config.model, run.batch_size // accelerator.num_processes
        limit = limit_left() if accelerator.device.type == "cpu" else math.inf
        step = quick_step(
            method, model.arch, config.data.image_size, run.precision, recomputed=model.checkpoint_activations,
            sharded=run.fsdp,
        )  # fmt: skip
        graphs = 1 if run.fsdp else method.graphs
        held = held_bytes(
            lambda: method.build(outline(model.arch, "frozen", image_size=config.data.image_size)), config.optim,
            sharing(config, accelerator), accelerator.num_processes, accelerator.device,
            copies=0 if run.precision == "no" or model.checkpoint_activations else graphs,
        )  # fmt: skip
        a_tile = teacher.pass_bytes(config.data.image_size, views_dtype(config)) if teacher is not None else 0.0
        check_memory(
            lambda rows: max(step.of(rows), a_tile * rows), micro_batch, share, accelerator.device, held, limit,
            sharded=run.fsdp,
        )  # fmt: skip


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


def _open_tracker(
    config: PretrainConfig, accelerator: Any, progress: Progress, manifest: dict[str, Any], lock: ExitStack | None
) -> NullTracker:
    """Open the run on rank 0 and broadcast its id, or the error, which every rank then raises."""
    tracker, answer = NullTracker(), ["", ""]
    if accelerator.is_main_process:
        try:
            tracker = open_run(
                config.run.output_dir, config, resume=config.run.resume != "never", step=progress.step,
                manifest=manifest, held=lock, later=True,
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
