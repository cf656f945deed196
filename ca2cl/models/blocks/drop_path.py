"""Drop path (arXiv 1603.09382) as a pure function of the row.

A residual branch is left out for some rows of a batch, and scaled by 1 / (1 - p) for the others. The passes of a step
must see one network: exact accumulation runs micro-batches again, the adversary sees the strong view a second time, and
any number of processes shares the rows. So nothing is drawn from a generator. A row of a view brings a word
(``views.batch.Views.words``), from which SplitMix64 (Steele, Lea and Flood, 2014) makes a number for each layer: the
k-th layer's is the k-th output of a generator that starts at the word.

Shapes: B rows of a pass, L layers with drop path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from ca2cl.errors import InputError


def _signed(word: int) -> int:
    """The int64 of the same bits."""
    return word - (1 << 64) if word >> 63 else word


_GAMMA, _FIRST, _SECOND = (_signed(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_BITS = 24  # what fp32 holds


class RowDraws:
    """Factors of a body's drop-path layers for the rows of the current pass. The layers share one object, as do copies.

    Attributes:
        table_LB: 0 where a layer leaves a row's branch out, else 1 / (1 - rate); None outside of passes.
    """

    def __init__(self) -> None:
        self.table_LB: Tensor | None = None
        self._rates: list[float] = []
        self._rates_L1 = torch.empty(0)

    def layer(self, rate: float) -> DropPath:
        """A new layer that leaves branches out with probability ``rate``."""
        self._rates.append(rate)
        return DropPath(rate, len(self._rates) - 1, self)

    def of(self, words_B: Tensor) -> AbstractContextManager[None]:
        """A pass of rows with these words, int64."""
        return self.set(self._factors(words_B))

    @contextmanager
    def set(self, table_LB: Tensor | None) -> Iterator[None]:
        """Use this table inside the block."""
        before, self.table_LB = self.table_LB, table_LB
        try:
            yield
        finally:
            self.table_LB = before

    def rows(self, start: int, count: int, of: int) -> AbstractContextManager[None]:
        """Rows ``start`` to ``start + count`` alone, if a pass of ``of`` rows is under way."""
        if self.table_LB is None or self.table_LB.shape[1] != of:
            return nullcontext()
        return self.set(self.table_LB[:, start : start + count])

    @torch.no_grad()
    def _factors(self, words_B: Tensor) -> Tensor:
        if self._rates_L1.device != words_B.device or len(self._rates_L1) != len(self._rates):
            self._rates_L1 = torch.tensor(self._rates, device=words_B.device)[:, None]
        kept_LB = uniform(words_B, len(self._rates)) >= self._rates_L1
        return kept_LB / (1 - self._rates_L1)


def uniform(words_B: Tensor, layers: int) -> Tensor:
    """Numbers in [0, 1) for each layer and row, fp32 (L, B): the first outputs of SplitMix64 from each word."""
    counts = torch.arange(1, layers + 1, device=words_B.device)
    x = words_B + (counts * _GAMMA)[:, None]
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    x = x ^ _shift(x, 31)
    return _shift(x, 64 - _BITS).float() * 2.0**-_BITS


def _shift(x: Tensor, bits: int) -> Tensor:
    """int64 to the right, with zeros from the left."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


class DropPath(nn.Module):
    """A residual branch's end; made by ``RowDraws.layer``. It changes nothing in evaluation mode.

    Attributes:
        rate: probability that a row's branch is left out.
        number: among the body's layers of this kind.
        draws: the body's.
    """

    def __init__(self, rate: float, number: int, draws: RowDraws) -> None:
        super().__init__()
        self.rate, self.number, self.draws = rate, number, draws

    def forward(self, x: Tensor) -> Tensor:
        """Some rows of ``x`` (B, ...) times 0, the others times 1 / (1 - rate)."""
        if not self.training:
            return x
        table_LB = self.draws.table_LB
        if table_LB is None:
            raise InputError(
                "model.drop_path: the method gives its network no words to draw from (Tiles.words); use "
                "--model.drop_path 0"
            )
        assert table_LB.shape[1] == len(x), (table_LB.shape, x.shape)
        return x * table_LB[self.number].view(-1, *[1] * (x.ndim - 1)).to(x.dtype)

    def replay(self) -> Callable[[], AbstractContextManager[None]]:
        """As ``recompute.PerPass.replay``."""
        return partial(self.draws.set, self.draws.table_LB)

    def extra_repr(self) -> str:
        """For ``repr``."""
        return f"rate={self.rate:.3g}"


def row_draws(module: nn.Module) -> RowDraws | None:
    """What the drop-path layers of ``module`` share; None where there are none."""
    return next((layer.draws for layer in module.modules() if isinstance(layer, DropPath)), None)


def dropping(module: nn.Module, words_B: Tensor | None) -> AbstractContextManager[None]:
    """A pass through ``module`` of rows with these words; None: of none, which only evaluation mode allows."""
    draws = row_draws(module) if words_B is not None else None
    return nullcontext() if draws is None or words_B is None else draws.of(words_B)
