"""Sample order of a job, and its demands on the shards."""

from __future__ import annotations

import logging

from ca2cl.data.loading.order import LaneOrder
from ca2cl.data.loading.slide_order import SlideOrder
from ca2cl.data.remote.reader import is_remote
from ca2cl.data.shards.index import ShardIndex
from ca2cl.errors import InputError
from ca2cl.methods.base import Method
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.runtime.launched import find_place

logger = logging.getLogger(__name__)


def sample_order(config: PretrainConfig, index: ShardIndex, world: int, method: Method) -> LaneOrder:
    """The order of ``data.lanes``, or with ``data.max_per_slide`` that of slides.

    Raises:
        InputError: the shards do not allow it, or have no slides where settings need them.
    """
    run, data, weight = config.run, config.data, config.objective.same_slide_weight
    if weight != 1 and not index.has_slides():
        raise InputError(
            f"objective.same_slide_weight is {weight:g}: no tile of data.shards has a slide or patient; leave it out, "
            "or write the shards with --group_pattern or --group_column"
        )
    if data.max_per_slide is None:
        order = LaneOrder(
            index, data.lanes, run.batch_size, run.seed, world=world, least=method.least_tiles,
            fewer=lambda tiles: method.too_few(tiles)[1],
        )  # fmt: skip
    else:
        _check_cache(config, index)
        order = SlideOrder(
            index, data.lanes, run.batch_size, run.seed, data.max_per_slide, world=world, least=method.least_tiles,
            fewer=lambda tiles: method.too_few(tiles)[1],
        )  # fmt: skip
        if find_place().rank == 0:
            _describe(order, len(index))
    order.check_world(world)
    return order


def _check_cache(config: PretrainConfig, index: ShardIndex) -> None:
    """Refuse a cache that cannot keep all shards: each tile of a batch would download one of them again."""
    data, size = config.data, index.manifest.bytes / 1e9
    if is_remote(data.shards) and data.cache_gb is not None and data.cache_gb < size:
        raise InputError(
            f"data.max_per_slide is {data.max_per_slide}: a batch reads from all of {len(index.shards)} shards, "
            f"{size:.3g} GB, and data.cache_gb is {data.cache_gb:g}; use at least --data.cache_gb {size * 1.01:.3g}, "
            "or leave data.max_per_slide out"
        )


def _describe(order: SlideOrder, tiles: int) -> None:
    used = order.steps_per_epoch * order.batch_size
    logger.info(
        "data.max_per_slide %d: %d of %d slides have more than that for each of the %d steps of an epoch; %d of %d "
        "tiles wait for the next epochs",
        order.max_per_slide, order.limited, order.table.named, order.steps_per_epoch, tiles - used, tiles,
    )  # fmt: skip


def warn_of_a_small_cache(config: PretrainConfig, index: ShardIndex, world: int) -> None:
    """Warn if the cache cannot hold one shard for each lane: every batch would then download shards again."""
    data = config.data
    lanes = data.lanes * find_place().local_world // world
    stood_in = min(lanes, len(index.shards)) * index.manifest.bytes / len(index.shards) / 1e9
    if is_remote(data.shards) and data.cache_gb is not None and data.cache_gb < stood_in:
        logger.warning(
            "data.cache_gb is %g: the %d lanes of this machine stand in shards of %.3g GB together, which will be "
            "fetched again and again; use at least --data.cache_gb %.3g", data.cache_gb, lanes, stood_in, 2 * stood_in,
        )  # fmt: skip
