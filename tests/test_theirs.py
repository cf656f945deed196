"""What is said about the method's authors' runs holds for the settings that stand beside it."""

from __future__ import annotations

import pytest

from ca2cl.cli import parse
from ca2cl.data.groups import LaneGroups
from ca2cl.errors import InputError


def test_groups_of_896_tiles_fit_their_batch_on_one_process_alone() -> None:
    """README and the recipe name them as near to the authors' BatchNorm, which saw one GPU's half of the batch."""
    config = parse("pretrain", ["--recipe", "nct_resnet18", "--model.norm", "lane_group", "--model.norm_group", "896"])
    groups = LaneGroups(config.data.lanes, config.run.batch_size, config.model.norm_group)
    assert config.run.batch_size // 2 == config.model.norm_group
    groups.check(1, config.run.batch_size)
    with pytest.raises(InputError, match="cannot share"):
        groups.check(2, config.run.batch_size // 2)
