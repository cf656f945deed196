"""Groups of tiles that share BatchNorm statistics under ``model.norm lane_group`` (docs/mathematics.md).

A block is k groups' worth of tiles, taken from lanes l = b, b + N, b + 2 N, ... where N is the number of blocks (or
from one lane, where a batch takes a whole block or more of each). A rank serves lanes l = r (mod W): if W divides N it
has whole blocks, and a micro-batch of whole blocks has whole groups. So what is in a group depends on the lanes, the
batch size, s and k alone.

The strong view's groups are runs of s tiles of a block, and the weak view's are every k-th tile of it: rows and columns
of a table. A pair's two groups have 1 / k of their tiles in common, among them the pair's own. The more they share, the
better the statistics tell the pair apart without a look at it, which is what shuffled BatchNorm prevents in MoCo
(arXiv 1911.05722). With k = 1 both views have the same groups, as under a BatchNorm of each GPU's own. How much lower
NT-Xent of held-out tiles is in the groups of training than in groups drawn anew, after 120 steps of a small network (G
256, s 16): .26 +- .03 with k = 1, .07 +- .02 with 2, .04 +- .02 with 4, .01 +- .01 with 8.

Legend: L lanes, G global batch, q = G / L samples a lane gives, s group size, k groups a block, N blocks, W world size,
B local rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ca2cl.config import ModelConfig
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
    groups: int = ModelConfig.norm_block

    def __post_init__(self) -> None:
        if not self._fits(self.batch_size, self.group, self.groups):
            raise InputError(
                f"{self._named}; a batch of run.batch_size = {self.batch_size} takes {self._each} from each of "
                f"data.lanes = {self.lanes}, and must be whole blocks, each a multiple or a divisor of what a lane "
                f"gives: {self._remedy(self.batch_size)}"
            )

    @property
    def block(self) -> int:
        """Tiles in a block, k s."""
        return self.groups * self.group

    @property
    def blocks(self) -> int:
        """N, blocks in a global batch."""
        return self.batch_size // self.block

    @property
    def _each(self) -> int:
        return self.batch_size // self.lanes

    @property
    def _named(self) -> str:
        return (
            f"model.norm_group is {self.group} and model.norm_block {self.groups}: blocks of {self.groups} groups, "
            f"{self.block} tiles"
        )

    def _fits(self, tiles: int, group: int, groups: int) -> bool:
        """Whether so many tiles are whole blocks of ``groups`` groups of ``group``, and such blocks fit the lanes."""
        block, each = group * groups, self._each
        return tiles % block == 0 and (block % each == 0 or each % block == 0)

    def check(self, world: int, micro_batch_size: int) -> None:
        """Whether ``world`` processes with micro-batches of that many tiles hold whole blocks.

        Raises:
            InputError: they do not.
        """
        if not self._fits(micro_batch_size, self.group, self.groups):
            raise InputError(
                f"{self._named}; each of {world} processes takes {micro_batch_size} tiles at a time, and these must be "
                f"whole blocks: {self._remedy(micro_batch_size)}"
            )

    def _remedy(self, tiles: int) -> str:
        """The nearest settings under which ``tiles`` are whole blocks."""
        groups, sizes = range(self.groups - 1, 1, -1), range(self.group - 1, 1, -1)
        remedies = [f"--model.norm_group {s}" for s in sizes if self._fits(tiles, s, self.groups)][:1]
        remedies += [f"--model.norm_block {k}" for k in groups if self._fits(tiles, self.group, k)][:1]
        if not remedies:
            return "use a larger batch, in larger micro-batches, on fewer processes"
        return ", or ".join(f"use {remedy}" for remedy in remedies)

    def first_order(self, positions_B: Tensor) -> Tensor:
        """In which order the local rows make up whole blocks, and the strong view's groups are runs of rows.

        Args:
            positions_B: the rows' places in the global batch, int64; row = lane * q + j.
        """
        each = self._each
        if each >= self.block:
            return torch.argsort(positions_B)
        lane_B, j_B = positions_B // each, positions_B % each
        block_B, turn_B = lane_B % self.blocks, lane_B // self.blocks
        return torch.argsort(block_B * self.block + turn_B * each + j_B)

    def second_order(self, rows: int) -> Tensor:
        """In which order rows that are in ``first_order`` make the weak view's groups runs of rows, (rows,) int64."""
        return torch.arange(rows).view(-1, self.group, self.groups).transpose(1, 2).reshape(rows)
