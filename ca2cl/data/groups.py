"""Which tiles of a batch share BatchNorm statistics under ``model.norm lane_group`` (DESIGN.md 3.1).

A block is two groups' worth of tiles, taken from lanes l = b, b + N, b + 2 N, ... where N is the number of blocks (or
from one lane, where a batch takes a whole block or more of each). A rank serves lanes l = r (mod W): if W divides N it
has whole blocks, and a micro-batch of whole blocks has whole groups. So what is in a group depends on the lanes, the
batch size and the group size alone. The strong view's groups are a block's halves and the weak view's are its even and
odd tiles: a positive pair does not share its statistics, which would tell the pair apart without looking at it (what
shuffled BatchNorm prevents in MoCo, arXiv 1911.05722).

Legend: L lanes, G global batch, q = G / L samples a lane gives, s group size, N blocks, W world size, B local rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ca2cl.errors import InputError


@dataclass(frozen=True)
class LaneGroups:
    """The groups of every batch of a run.

    Raises:
        InputError: the batch is no whole number of blocks, or blocks do not fit the lanes.
    """

    lanes: int
    batch_size: int
    group: int

    def __post_init__(self) -> None:
        block, each = self.block, self.batch_size // self.lanes
        if self.batch_size % block or (block % each and each % block):
            raise InputError(
                f"model.norm_group is {self.group}: it needs blocks of two groups, {block} tiles; a batch of "
                f"run.batch_size = {self.batch_size} takes {each} from each of data.lanes = {self.lanes}; make the "
                "batch a multiple of a block, and a block a multiple or a divisor of what a lane gives"
            )

    @property
    def block(self) -> int:
        """Tiles in a block, 2 s."""
        return 2 * self.group

    @property
    def blocks(self) -> int:
        """N, blocks in a global batch."""
        return self.batch_size // self.block

    def check(self, world: int, micro_batch_size: int) -> None:
        """Whether ``world`` processes with micro-batches of that many tiles hold whole blocks.

        Raises:
            InputError: they do not.
        """
        if self.blocks % world:
            raise InputError(
                f"model.norm_group is {self.group}: a batch of {self.batch_size} tiles has {self.blocks} blocks of two "
                f"groups, which {world} processes cannot share evenly; use a smaller group or a larger batch"
            )
        if micro_batch_size % self.block:
            raise InputError(
                f"run.micro_batch_size is {micro_batch_size}: tiles are taken in whole blocks of two groups; "
                f"use a multiple of {self.block}, or a smaller model.norm_group"
            )

    def first_order(self, positions_B: Tensor) -> Tensor:
        """In which order the local rows make up whole blocks, and the strong view's groups are runs of rows.

        Args:
            positions_B: the rows' places in the global batch, int64; row = lane * q + j.
        """
        each = self.batch_size // self.lanes
        if each >= self.block:
            return torch.argsort(positions_B)
        lane_B, j_B = positions_B // each, positions_B % each
        block_B, turn_B = lane_B % self.blocks, lane_B // self.blocks
        return torch.argsort(block_B * self.block + turn_B * each + j_B)

    def second_order(self, rows: int) -> Tensor:
        """In which order rows that are in ``first_order`` make the weak view's groups runs of rows, (rows,) int64."""
        return torch.arange(rows).view(-1, self.group, 2).transpose(1, 2).reshape(rows)
