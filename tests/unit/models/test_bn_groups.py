"""Groups of normalisation: the same on any number of processes and micro-batches, and different for the two views."""

import re

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from ca2cl.config import ModelConfig
from ca2cl.errors import InputError
from ca2cl.models.bn_groups import LaneGroups
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.pretrain.shares import check_resume, lane_groups


def groups_of(rule: LaneGroups, world: int, micro_batch_size: int) -> tuple[set[frozenset[int]], set[frozenset[int]]]:
    """Every group of both views as a set of places in the global batch, found as a run finds them."""
    each = rule.batch_size // rule.lanes
    first, second = set(), set()
    for rank in range(world):
        lanes = torch.arange(rank, rule.lanes, world)
        positions = (lanes[:, None] * each + torch.arange(each)).flatten()
        for rows in positions[rule.first_order(positions)].split(micro_batch_size):
            first |= {frozenset(part.tolist()) for part in rows.split(rule.group)}
            weak = rows[rule.second_order(len(rows))]
            second |= {frozenset(part.tolist()) for part in weak.split(rule.group)}
    return first, second


@st.composite
def rules(draw: st.DrawFn) -> LaneGroups:
    lanes = 2 ** draw(st.integers(0, 6))
    each = 2 ** draw(st.integers(0, 4))
    group, groups = 2 ** draw(st.integers(1, 4)), 2 ** draw(st.integers(0, 3))
    assume(groups <= group and lanes * each % (groups * group) == 0)
    return LaneGroups(lanes, lanes * each, group, groups)


@given(rule=rules(), world=st.sampled_from([1, 2, 4, 8]), parts=st.sampled_from([1, 2, 4]))
def test_groups_do_not_depend_on_processes_or_micro_batches(rule: LaneGroups, world: int, parts: int) -> None:
    share = rule.batch_size // world
    assume(rule.lanes % world == 0 and share % parts == 0)
    try:
        rule.check(world, share // parts)
    except InputError:
        assume(False)
    whole = groups_of(rule, 1, rule.batch_size)
    assert groups_of(rule, world, share // parts) == whole
    for groups in whole:
        assert sorted(row for group in groups for row in group) == list(range(rule.batch_size))
        assert {len(group) for group in groups} == {rule.group}


@given(rule=rules())
def test_a_pairs_two_groups_have_one_kth_of_their_tiles_in_common(rule: LaneGroups) -> None:
    first, second = groups_of(rule, 1, rule.batch_size)
    for group in second:
        common = [len(group & other) for other in first if group & other]
        assert common == [rule.group // rule.groups] * rule.groups


def test_by_default_it_is_a_quarter() -> None:
    assert ModelConfig().norm_block == 4


def test_groups_that_the_block_does_not_divide_are_mixed_as_evenly_as_can_be() -> None:
    first, second = groups_of(LaneGroups(7, 70, 10, 7), 1, 70)
    assert {len(group & other) for group in second for other in first} == {1, 2}


@pytest.mark.parametrize(
    ("lanes", "batch_size", "group", "groups", "message"),
    [
        (
            8,
            24,
            8,
            4,
            "blocks of 4 groups, 32 tiles; .*: use --model.norm_group 6, or use --model.norm_block 3$",
        ),
        (8, 96, 4, 2, "takes 12 from each of data.lanes = 8, .*: use --model.norm_group 3$"),
        (7, 7, 4, 4, "use a larger batch"),
    ],
)
def test_a_batch_of_other_than_whole_blocks_is_refused(
    lanes: int, batch_size: int, group: int, groups: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        LaneGroups(lanes, batch_size, group, groups)


@given(
    lanes=st.integers(1, 64), each=st.integers(1, 16), group=st.integers(2, 32), groups=st.integers(1, 8),
    world=st.integers(1, 8), parts=st.integers(1, 4), alternative=st.integers(0, 1),
)  # fmt: skip
def test_whoever_follows_the_remedy_has_whole_blocks(
    lanes: int, each: int, group: int, groups: int, world: int, parts: int, alternative: int
) -> None:
    batch_size = lanes * each
    assume(lanes % world == 0 and batch_size % (world * parts) == 0)

    def refused(**settings: int) -> str:
        try:
            rule = LaneGroups(lanes, batch_size, **{"group": group, "groups": groups, **settings})
            rule.check(world, batch_size // world // parts)
        except InputError as error:
            return str(error)
        return ""

    settings, names = {}, {"norm_group": "group", "norm_block": "groups"}
    for _ in range(2):  # what the batch must be, and then what a process takes of it
        found = re.findall(r"--model\.(\w+) (\d+)", refused(**settings))
        if found:
            name, value = found[min(alternative, len(found) - 1)]
            settings[names[name]] = int(value)
    assert "--model" not in refused(**settings)


@pytest.mark.parametrize(
    ("world", "size", "message"),
    [(4, 16, "each of 4 processes takes 16 .*: use --model.norm_group 4, or use --model.norm_block 2"), (1, 8, "2$")],
)
def test_a_share_of_other_than_whole_blocks_is_refused(world: int, size: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LaneGroups(64, 64, 8, 4).check(world, size)


def test_a_run_of_other_blocks_goes_on_with_them_alone() -> None:
    new = PretrainConfig(model=ModelConfig(norm="lane_group"))
    old = PretrainConfig(model=ModelConfig(norm="lane_group", norm_block=2))
    with pytest.raises(InputError, match="has blocks of 2 groups; go on with --model.norm_block 2"):
        check_resume(new, lane_groups(new, 1, 256), {})
    check_resume(old, lane_groups(old, 1, 256), {})
    check_resume(new, lane_groups(new, 1, 256), {"norm_block": 4})
    check_resume(PretrainConfig(), None, {})
