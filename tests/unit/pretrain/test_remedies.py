"""Whatever numbers a remedy names, a user who follows it gets past what was refused, and soon to a job that starts."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ca2cl.config import DataConfig, ModelConfig, ObjectiveConfig, RunConfig
from ca2cl.data.loading.order import LaneOrder
from ca2cl.errors import InputError
from ca2cl.methods.ca2cl.method import CA2CL
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.pretrain.shares import check_least, micro_batch


class Job(NamedTuple):
    """The numbers that must fit together."""

    total: int
    world: int
    lanes: int
    batch_size: int
    clusters: int
    micro_batch_size: int | None
    norm: str = "sync"
    accumulation: str = "exact"

    def start(self) -> None:
        """What a job's start checks, in its order."""
        config = PretrainConfig(
            data=DataConfig(lanes=self.lanes),
            model=ModelConfig(norm=cast(Any, self.norm)),
            objective=ObjectiveConfig(clusters=self.clusters),
            run=RunConfig(
                batch_size=self.batch_size,
                micro_batch_size=self.micro_batch_size,
                accumulation=cast(Any, self.accumulation),
                steps=1,
            ),
        )
        method = CA2CL(config.objective)
        check_least(config, method)
        index = SimpleNamespace(starts=np.array([0, self.total], np.int64))
        order = LaneOrder(
            index, self.lanes, self.batch_size, 0, world=self.world, least=method.least_tiles,
            fewer=lambda tiles: method.too_few(tiles)[1],
        )  # fmt: skip
        order.check_world(self.world)
        micro_batch(config, self.world)

    def following(self, remedy: str) -> Job | None:
        """The job that follows one alternative of a remedy; None where it asks for more tiles."""
        if "make shards of more tiles" in remedy or "start fewer processes" in remedy:
            return None
        if processes := re.search(r"start (\d+)", remedy):
            return self._replace(world=int(processes[1]))
        job = self._replace(micro_batch_size=None) if "leave it out" in remedy else self
        flags = re.findall(r"--\w+\.(\w+) (\w+)", remedy)
        assert flags or job is not self, remedy
        return job._replace(**{name: int(value) if value.isdecimal() else value for name, value in flags})


JOBS = st.builds(
    Job, st.integers(1, 60), st.integers(1, 6), st.integers(1, 16), st.integers(2, 64), st.integers(2, 12),
    st.none() | st.integers(2, 64),
)  # fmt: skip


def refusal(job: Job) -> str:
    try:
        job.start()
    except InputError as error:
        return str(error)
    return ""


def settle(job: Job, met: tuple[str, ...] = ()) -> None:
    """Follow every alternative of every remedy until the job starts."""
    message = refusal(job)
    if not message:
        return
    kind = re.sub(r"\d+", "#", message.partition(";")[0])
    assert kind not in met, (job, message, met)  # what was followed has helped
    for alternative in re.split(r", or |; ", message.partition(";")[2]):
        after = job.following(alternative)
        if after is not None:
            settle(after, (*met, kind))


@settings(deadline=None, max_examples=400)
@given(JOBS)
def test_whoever_follows_a_remedy_gets_on(job: Job) -> None:
    settle(job)


@settings(deadline=None, max_examples=200)
@given(JOBS)
def test_more_tiles_are_asked_for_only_where_no_numbers_would_do(job: Job) -> None:
    message = refusal(job)
    if "make shards of more tiles" in message:
        fewest = max(job.clusters, 2)
        assert job.total // job.world * job.world < fewest, message


def test_two_tiles_in_eight_lanes() -> None:
    job = Job(total=2, world=1, lanes=8, batch_size=32, clusters=2, micro_batch_size=None)
    assert refusal(job).endswith("use --run.batch_size 2 with --data.lanes 2")
    assert refusal(job._replace(clusters=10)).endswith(
        "make shards of more tiles, or use --run.batch_size 2 with --data.lanes 2 and --objective.clusters 2"
    )
    assert refusal(job._replace(total=1)).endswith("make shards of more tiles")
    assert refusal(job._replace(total=9, clusters=9)).endswith("use --run.batch_size 9 with --data.lanes 3")


def test_a_method_without_a_setting_for_fewer_tiles_names_none() -> None:
    index = SimpleNamespace(starts=np.array([0, 4], np.int64))
    with pytest.raises(InputError, match="; make shards of more tiles$"):
        LaneOrder(index, 4, 8, 0, least=8)


@pytest.mark.parametrize(("batch", "lanes"), [(30, 8), (7, 2), (64, 48), (3, 64)])
def test_a_batch_that_lanes_do_not_divide(batch: int, lanes: int) -> None:
    with pytest.raises(InputError, match=r"--data\.lanes (\d+)") as refused:
        PretrainConfig(data=DataConfig(lanes=lanes), run=RunConfig(batch_size=batch))
    good = int(str(refused.value).rpartition(" ")[2])
    PretrainConfig(data=DataConfig(lanes=good), run=RunConfig(batch_size=batch), objective=ObjectiveConfig(clusters=2))
