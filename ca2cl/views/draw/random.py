"""Stateless random draws by seed, epoch, sample key and view.

A sample is therefore augmented alike whatever the batch, the rank or the worker that it meets, and a resumed run
goes on with the same views. The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Words = npt.NDArray[np.uint64]


def mix(x: Words) -> Words:
    """SplitMix64's output function: a bijection of words in which every input bit flips half of the output's."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


@cache
def word_of(*parts: int | str) -> np.uint64:
    """A word that stands for a tuple of numbers and names on every platform."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    word: np.uint64 = np.uint64(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))
    return word


def row_words(
    key_hash_B: npt.NDArray[np.int64], *, seed: int, epoch: int, views: Sequence[str]
) -> npt.NDArray[np.int64]:
    """A word for each view of each sample, int64 (V, B), unrelated to what the views draw.

    Args:
        key_hash_B: int64 (B,), one word a sample.
        seed: the run's seed.
        epoch: number of the pass over the data.
        views: their names.
    """
    streams = np.array([word_of(seed, epoch, view, "network") for view in views])
    return mix(mix(key_hash_B.view(np.uint64)) ^ streams[:, None]).view(np.int64)


class Draws:
    """The named draws of some views of a batch, all made at once; every number is (V, B).

    Args:
        key_hash_B: int64 (B,), one word a sample.
        seed: the run's seed.
        epoch: number of the pass over the data.
        views: names of the V views, which draw independently.
        names: of the draws, which are independent.
    """

    def __init__(
        self, key_hash_B: npt.NDArray[np.int64], *, seed: int, epoch: int, views: Sequence[str], names: Sequence[str]
    ) -> None:
        if key_hash_B.dtype != np.int64 or key_hash_B.ndim != 1:
            raise ValueError(f"key_hash is {key_hash_B.dtype} {key_hash_B.shape}: give int64 (B,)")
        # Two rounds: the key is spread before the stream's word meets it, so that related keys stay unrelated.
        streams = np.array([word_of(seed, epoch, view) for view in views])
        state = mix(mix(key_hash_B.view(np.uint64)) ^ streams[:, None])
        words = mix(state ^ np.array([word_of(name) for name in names])[:, None, None])
        self._units = dict(zip(names, (words >> np.uint64(11)).astype(np.float64) * 2.0**-53, strict=True))

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0) -> Floats:
        """Uniform numbers in [low, high)."""
        numbers: Floats = self._units[name] * (high - low) + low
        return numbers

    def chance(self, name: str, probability: float | Floats) -> Flags:
        """True with a probability, which may differ between the views, (V, 1)."""
        drawn: Flags = self._units[name] < probability
        return drawn

    def choice(self, name: str, count: int) -> npt.NDArray[np.int64]:
        """One of 0 ... count-1, each as likely."""
        drawn: npt.NDArray[np.int64] = (self._units[name] * count).astype(np.int64)
        return drawn
