"""Stateless random draws by seed, epoch, sample key and view.

A sample is therefore augmented alike whatever the batch, the rank or the worker that it meets, and a resumed run
goes on with the same views. The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, 2014), whose
wrapping products int64 tensors compute alike on every device; logical shifts are arithmetic ones, masked.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _signed(word: int) -> int:
    """The int64 with the same 64 bits as an unsigned word."""
    word &= _MASK
    return word - (1 << 64) if word >> 63 else word


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's output function: a bijection of 64-bit words in which every input bit flips half of the output's.

    Args:
        x: int64, any shape; its bits are taken as unsigned words.

    Returns:
        int64 of the same shape.
    """
    x = x + _signed(_GOLDEN)
    x = (x ^ _shift(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX_2)
    return x ^ _shift(x, 31)


def word_of(*parts: int | str) -> int:
    """A 64-bit word, as a signed int, that stands for a tuple of numbers and names on every platform."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return _signed(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))


class Draws:
    """The draws of one view of a batch.

    Args:
        key_hash: int64 (B,), one word a sample.
        seed: the run's seed.
        epoch: number of the pass over the data.
        view: name of the view; two views draw independently.
    """

    def __init__(self, key_hash: Tensor, *, seed: int, epoch: int, view: str) -> None:
        if key_hash.dtype != torch.int64 or key_hash.ndim != 1:
            raise ValueError(f"key_hash is {key_hash.dtype} {tuple(key_hash.shape)}: give int64 (B,)")
        # Two rounds: the key is spread before the stream's word meets it, so that related keys stay unrelated.
        self._state = mix(mix(key_hash) ^ word_of(seed, epoch, view))
        self._drawn: dict[str, Tensor] = {}
        self._whole: Draws | None = None
        self._rows = slice(None)

    def __len__(self) -> int:
        return len(self._state)

    def rows(self, rows: slice) -> Draws:
        """The draws of some of the samples. A word is worked out once, for all of them, however they are cut."""
        part = object.__new__(Draws)
        part._state, part._whole, part._rows, part._drawn = self._state[rows], self, rows, {}
        return part

    @property
    def device(self) -> torch.device:
        """Where the draws lie."""
        return self._state.device

    def words(self, name: str) -> Tensor:
        """Uniform 64-bit words, int64 (B,)."""
        if name not in self._drawn:
            if self._whole is not None:
                self._drawn[name] = self._whole.words(name)[self._rows]
            else:
                self._drawn[name] = mix(self._state ^ word_of(name))
        return self._drawn[name]

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform numbers in [low, high), float64 (B,), from the top 53 bits."""
        unit = _shift(self.words(name), 11).double() * 2.0**-53
        return unit * (high - low) + low

    def chance(self, name: str, probability: float | Tensor) -> Tensor:
        """True with a probability, bool (B,)."""
        return self.uniform(name) < probability

    def choice(self, name: str, count: int) -> Tensor:
        """One of 0 … count-1, each as likely, int64 (B,)."""
        return (self.uniform(name) * count).long()
