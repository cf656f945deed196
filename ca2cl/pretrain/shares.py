"""Micro-batch size and BatchNorm groups of a process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ca2cl.errors import InputError
from ca2cl.methods.base import Method
from ca2cl.models.backbone import has_batch_norm, outline
from ca2cl.models.batch_norm import Norm
from ca2cl.models.bn_groups import LaneGroups
from ca2cl.pretrain.config import PretrainConfig


def check_least(config: PretrainConfig, method: Method) -> None:
    """Check that the batch (under ``plain`` accumulation the micro-batch) is large enough for the method.

    Raises:
        InputError: it is not.
    """
    run, least = config.run, method.least_tiles
    name, smallest, more = "run.batch_size", run.batch_size, -(-least // config.data.lanes) * config.data.lanes
    remedy = f"use --run.batch_size {more}"
    if run.accumulation == "plain" and run.micro_batch_size:
        name, smallest, remedy = "run.micro_batch_size", run.micro_batch_size, "leave it out"
    if smallest < least:
        why, other = method.too_few(smallest)
        raise InputError(f"{name} is {smallest}: {why}; {remedy}{f', or {other}' if other else ''}")


def check_accumulation(config: PretrainConfig, method: Method, world: int, micro_batch_size: int) -> None:
    """Check that the method supports ``run.accumulation``.

    Args:
        config: the job's.
        method: whose step it is.
        world: processes.
        micro_batch_size: of a process.

    Raises:
        InputError: it cannot.
    """
    kind, several = config.run.accumulation, config.run.batch_size // world > micro_batch_size
    if kind not in method.accumulations and (several or kind == "bitwise"):
        raise InputError(
            f"run.accumulation is {kind}: method.name {config.method.name} has {' and '.join(method.accumulations)}; "
            f"use --run.accumulation {method.accumulations[0]}{', or leave run.micro_batch_size out' * several}"
        )


def norm_of(config: PretrainConfig) -> Norm:
    """``model.norm``, or frozen for a backbone without BatchNorm, whose rows are independent as well."""
    model = config.model
    if model.norm == "frozen" or has_batch_norm(outline(model.arch, image_size=config.data.image_size)):
        return model.norm
    return "frozen"


def micro_batch(config: PretrainConfig, world: int) -> int:
    """Rows that one process holds at a time.

    Raises:
        InputError: they do not divide a process's share, or ``run.accumulation`` promises a result that they change.
    """
    run = config.run
    share = run.batch_size // world
    size = run.micro_batch_size or share
    if share % size:
        raise InputError(
            f"run.micro_batch_size is {size}: a process has {share} tiles of a batch, which it must divide; "
            f"{_divisor_near(share, size)}"
        )
    if run.accumulation != "plain" and size < share and norm_of(config) == "sync":
        # The gradient would be 57 % off the whole batch's with 4 micro-batches of 16 tiles (measured).
        raise InputError(
            f"run.micro_batch_size is {size}: under model.norm sync BatchNorm sees one micro-batch at a time, and "
            f"run.accumulation {run.accumulation} would not give the whole batch's result; leave it out, or use "
            "--model.norm lane_group, or --model.norm frozen, or --run.accumulation plain"
        )
    return size


def _divisor_near(share: int, size: int) -> str:
    divisors = [number for number in range(2, share + 1) if share % number == 0]
    below = [number for number in divisors if number <= size] or divisors[:1]
    return f"use --run.micro_batch_size {below[-1]}, or leave it out" if below else "leave it out"


def lane_groups(config: PretrainConfig, world: int, micro_batch_size: int) -> LaneGroups | None:
    """BatchNorm groups, if ``model.norm`` or ``run.accumulation bitwise`` uses them; None otherwise.

    Raises:
        InputError: a batch, or what one process holds at a time, is no whole number of blocks.
    """
    model = config.model
    if config.run.accumulation != "bitwise" and norm_of(config) != "lane_group":
        return None
    groups = LaneGroups(config.data.lanes, config.run.batch_size, model.norm_group, model.norm_block)
    groups.check(world, micro_batch_size)
    return groups


def check_resume(config: PretrainConfig, groups: LaneGroups | None, state: Mapping[str, Any]) -> None:
    """Check that a checkpoint's ``state`` belongs to a run with the same groups.

    Raises:
        InputError: it is not.
    """
    began = state.get("norm_block", 2)  # of a version that had blocks of two groups, and did not write it down
    if groups is not None and began != groups.groups:
        raise InputError(
            f"model.norm_block is {config.model.norm_block}: the run in run.output_dir has blocks of {began} groups; "
            f"go on with --model.norm_block {began}, or use another run.output_dir"
        )
