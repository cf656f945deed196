"""Methods with a global-batch loss, over one or several micro-batches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ca2cl.methods.base import Engine, Method
from ca2cl.methods.gather import all_sum
from ca2cl.models.batch_norm import commit_statistics


class AccumulatedMethod(Method):
    """A method that gives the gradient of one micro-batch's own loss, and that of the whole batch's.

    Args:
        accumulation: what several micro-batches mean. exact: the whole batch's loss, its gradient brought back to one
            micro-batch after another; plain: the mean of the micro-batches' own losses. exact holds where a micro-batch
            passes through the network as it would within the whole batch: not under norm sync, whose statistics are
            then the micro-batch's.
    """

    accumulations = ("exact", "plain", "bitwise")

    def __init__(self, accumulation: Literal["exact", "plain"] = "exact") -> None:
        self.accumulation = accumulation

    @abstractmethod
    def micro_step(self, engine: Engine, views: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """A scalar with the gradient of this rank's share of one micro-batch's loss, and the loss's terms."""

    @abstractmethod
    def exact_step(self, engine: Engine, micro_batches: Sequence[Any]) -> dict[str, Tensor]:
        """Accumulate the gradient of the whole batch's loss; returns this rank's share of the terms."""

    def step(self, engine: Engine, micro_batches: Sequence[Any]) -> dict[str, Tensor]:
        """As ``Method.step``."""
        several = len(micro_batches) > 1
        assert not (engine.sharded and several and self.accumulation == "plain"), "pretrain.engines refuses it"
        if engine.sharded or (several and self.accumulation == "exact"):
            shares = self.exact_step(engine, micro_batches)
        else:
            shares = self._plain_step(engine, micro_batches)
        commit_statistics(engine.bare)
        summed = all_sum(torch.stack([value.double() for value in shares.values()]))
        return dict(zip(shares, summed.unbind(), strict=True))

    def _plain_step(self, engine: Engine, micro_batches: Sequence[Any]) -> dict[str, Tensor]:
        totals: dict[str, Tensor] = {}
        for number in range(len(micro_batches)):
            with engine.micro_step(last=number == len(micro_batches) - 1):
                loss, terms = self.micro_step(engine, micro_batches[number])
                engine.backward(loss / len(micro_batches))
            for name, value in terms.items():
                share = value.detach() if name in self.counters else value.detach() / len(micro_batches)
                totals[name] = totals[name] + share if name in totals else share
        return totals
