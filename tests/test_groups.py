"""Groups of normalisation: the same on any number of processes and micro-batches, and different for the two views."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from ca2cl.data.groups import LaneGroups
from ca2cl.errors import InputError


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
    group = 2 ** draw(st.integers(1, 4))
    assume(lanes * each % (2 * group) == 0)
    return LaneGroups(lanes, lanes * each, group)


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
def test_a_pairs_two_groups_are_different_ones_of_the_same_block(rule: LaneGroups) -> None:
    first, second = groups_of(rule, 1, rule.batch_size)
    assert not first & second
    for group in second:
        halves = [len(group & other) for other in first if group & other]
        assert halves == [rule.group // 2] * 2


@pytest.mark.parametrize(
    ("lanes", "batch_size", "group", "message"),
    [(8, 24, 8, "blocks of two groups, 16 tiles"), (8, 96, 4, "takes 12 from each of data.lanes = 8")],
)
def test_a_batch_of_other_than_whole_blocks_is_refused(lanes: int, batch_size: int, group: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LaneGroups(lanes, batch_size, group)


@pytest.mark.parametrize(
    ("world", "size", "message"), [(4, 16, "has 2 blocks of two groups, which 4 processes"), (1, 8, "a multiple of 16")]
)
def test_a_share_of_other_than_whole_blocks_is_refused(world: int, size: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LaneGroups(32, 32, 8).check(world, size)
