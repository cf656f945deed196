"""Check a job: shards, lanes, processes, workers and decoding rate."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch

from ca2cl.common.tables import duration
from ca2cl.config import IMAGENET_MEAN, IMAGENET_STD, DataConfig, ModelConfig, RunConfig, ViewsConfig
from ca2cl.data.loading.order import LaneOrder
from ca2cl.data.loading.stream import LaneStream, TileBatch
from ca2cl.data.remote.reader import ShardReader, open_index
from ca2cl.data.shards.index import ShardIndex
from ca2cl.doctor.config import DoctorConfig
from ca2cl.doctor.finding import Finding
from ca2cl.errors import InputError
from ca2cl.methods.base import LocalEngine, Method, MethodSettings, Tiles
from ca2cl.methods.registry import DEFAULT, build_method
from ca2cl.models.backbone import build_encoder
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.pretrain.shares import lane_groups, micro_batch
from ca2cl.runtime.precision import seconds_of
from ca2cl.views.build import build_views

_PATIENCE_S = 3.0
_STEP_TILES = 32
_WEEK_S = 7 * 86400


def job(plan: DoctorConfig, shards: str) -> Iterator[Finding]:
    """The order's arithmetic, and measured rates of reading, views and the step.

    Args:
        plan: the settings, with the number of processes that there will be.
        shards: the planned job's shard folder.
    """
    try:
        index = open_index(shards, plan.cache_dir)
        order = LaneOrder(index, plan.lanes, plan.batch_size, seed=0, world=plan.processes)
        order.check_world(plan.processes)
        _check_shares(plan)
    except InputError as error:
        yield Finding("order", "wrong", str(error), "change what the line names")
        return
    reader = ShardReader(shards, plan.cache_dir, index=index)
    yield arithmetic(index, order, plan)
    yield from rates(index, order, reader, plan)


def _check_shares(plan: DoctorConfig) -> None:
    """Refuse the micro-batches and groups of normalisation that pre-training would refuse."""
    config = PretrainConfig(
        data=DataConfig(lanes=plan.lanes),
        model=ModelConfig(arch=plan.arch, norm=plan.norm, norm_group=plan.norm_group, norm_block=plan.norm_block),
        run=RunConfig(
            batch_size=plan.batch_size, micro_batch_size=plan.micro_batch_size, accumulation=plan.accumulation
        ),
    )
    lane_groups(config, plan.processes, micro_batch(config, plan.processes))


def arithmetic(index: ShardIndex, order: LaneOrder, plan: DoctorConfig) -> Finding:
    """Lanes and batches of an epoch, and the number of shards that a batch's tiles come from."""
    tiles, used = len(index), order.steps_per_epoch * plan.batch_size
    plan_of_first = order.batch(0)
    from_shards = len({index.locate(int(sample))[0] for sample in plan_of_first.samples})
    text = (
        f"{tiles} tiles in {len(index.shards)} shards = {plan.lanes} lanes of {order.lane_length}; a batch of "
        f"{plan.batch_size} takes {order.per_lane} of each lane, from {from_shards} shards; {order.steps_per_epoch} "
        f"steps an epoch leave out {tiles - used} tiles"
    )
    if plan.processes > 1:
        text += f"; each of {plan.processes} processes reads {plan.lanes // plan.processes} lanes"
    return Finding("order", "ok", text)


def rates(index: ShardIndex, order: LaneOrder, reader: ShardReader, plan: DoctorConfig) -> Iterator[Finding]:
    """Measured tiles/s of reading and decoding on one core, and of views and training on the device.

    Args:
        index: of the shards.
        order: of their tiles.
        reader: of their bytes.
        plan: settings of the planned job.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        reading, batch = _reading(index, order, reader, plan.processes)
    except InputError as error:
        yield Finding("reading", "wrong", str(error), "write the shards again with `ca2cl shard`")
        return
    views = build_views(ViewsConfig(recipe=plan.recipe), plan.image_size, mean=IMAGENET_MEAN, std=IMAGENET_STD, seed=0)
    method = build_method(DEFAULT, MethodSettings())
    taken = torch.arange(_STEP_TILES) % len(batch.tiles)  # again where a share is smaller: clusters take their number
    keys, pixels = batch.key_hash[taken], batch.tiles[taken].to(device)
    tiles = Tiles(pixels, keys, 0, torch.arange(len(keys), device=device))

    def make() -> Any:
        made = method.views(tiles, views)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return made

    viewing = len(keys) / seconds_of(make)
    encoder = build_encoder(plan.arch, image_size=plan.image_size, identity_blocks=True)
    stepping = len(keys) / _step_seconds(method, method.build(encoder), make(), device)
    taking = 1 / (1 / viewing + 1 / stepping)
    yield _supply(reading, taking, plan)
    yield _views(viewing, stepping, plan, device)
    yield _epoch(order.steps_per_epoch, min(taking, max(1, plan.workers) * reading), plan, device)


def _epoch(steps: int, rate: float, plan: DoctorConfig, device: torch.device) -> Finding:
    """The time of an epoch at ``rate`` tiles/s a process; a note where a hundred of them take more than a week."""
    step = plan.batch_size / plan.processes / rate
    text = f"about {duration(steps * step)} for {steps} steps of {duration(step)} on {device.type}, estimated"
    if steps * step * 100 < _WEEK_S:
        return Finding("an epoch", "ok", text)
    return Finding("an epoch", "note", text, "a GPU, smaller views (--image_size) or a smaller --arch take less")


def _reading(index: ShardIndex, order: LaneOrder, reader: ShardReader, processes: int) -> tuple[float, TileBatch]:
    """Tiles/s of one decoding process, and a batch. What the page cache holds is read from there, as in an epoch."""
    stream = iter(LaneStream(index, order, reader, world=processes, stop_step=order.steps_per_epoch * 1000))
    first = next(stream)
    began, tiles = time.perf_counter(), 0
    while time.perf_counter() - began < _PATIENCE_S:
        tiles += len(next(stream).keys)
    return tiles / (time.perf_counter() - began), first


def _step_seconds(method: Method, network: torch.nn.Module, batch: Any, device: torch.device) -> float:
    """Seconds of a network's gradient on these views, adversary and all; bf16 where there is a GPU."""
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def once() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            method.step(LocalEngine(network.train()), [batch])
        if device.type == "cuda":
            torch.cuda.synchronize()

    return seconds_of(once, repeats=1)


def _supply(reading: float, taking: float, plan: DoctorConfig) -> Finding:
    """Rates of a process's workers and of its device; wrong where the workers do not keep up."""
    workers = max(1, plan.workers)
    text = (
        f"{reading:,.0f} tiles/s with 1 worker"
        + (f", {workers * reading:,.0f} with {workers}" if workers > 1 else "")
        + f"; the step takes {taking:,.0f} tiles/s"
        + (" in each process" if plan.processes > 1 else "")
    )
    if workers * reading < taking:
        return Finding("reading", "wrong", text, f"use --data.workers {math.ceil(taking / reading)}")
    return Finding("reading", "ok", text)


def _views(viewing: float, stepping: float, plan: DoctorConfig, device: torch.device) -> Finding:
    text = (
        f"{plan.recipe} views of {plan.image_size} px: {viewing:,.0f} pairs/s on {device.type}; "
        f"a step of {plan.arch}: {stepping:,.0f} tiles/s"
    )
    return Finding("views, step", "ok" if viewing > stepping else "note", text)
