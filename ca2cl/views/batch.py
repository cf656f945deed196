"""Render the two views of a batch of tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from ca2cl.models.preprocess import normalise_, to_planes
from ca2cl.views.ops.random import Draws

# Numbers in the planes that are worked on together: on a CPU few enough to stay in a core's cache, on another device
# enough to fill it.
_CHUNK_CPU = 600_000
_CHUNK_DEVICE = 40_000_000


class Recipe(Protocol):
    """How the strong and the weak view of a tile are made."""

    name: str

    def strong(self, images: Tensor, draws: Draws) -> Tensor:
        """float32 (B, 3, H, W) → (B, 3, S, S), both in [0, 1]; the tiles are left as they were."""

    def weak(self, images: Tensor, draws: Draws) -> Tensor:
        """The same for the weak view."""


class Views:
    """Both views of every tile, each a pure function of (seed, epoch, the sample's key).

    A sample's views do not depend on which other tiles are in the batch.

    Args:
        recipe: how a view is made.
        image_size: side S of the views in pixels.
        mean: of the encoder's input channels, in [0, 1].
        std: of the channels.
        seed: the run's seed.
    """

    def __init__(
        self, recipe: Recipe, image_size: int, *, mean: Sequence[float], std: Sequence[float], seed: int
    ) -> None:
        self.recipe = recipe
        self.image_size = image_size
        self.mean, self.std = tuple(mean), tuple(std)
        self.seed = seed

    def __call__(self, tiles_BHWC: Tensor, key_hash_B: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """The strong and the weak view, normalised.

        Args:
            tiles_BHWC: uint8 (B, H, W, 3), RGB, on any device; H and W may differ from S.
            key_hash_B: int64 (B,), one word a sample.
            epoch: number of the pass over the data.

        Returns:
            Two float32 (B, 3, S, S) in channels_last order, on the tiles' device.
        """
        strong, weak = self._make(tiles_BHWC, key_hash_B, epoch, normalised=True)
        return strong, weak

    def weak(self, tiles_BHWC: Tensor, key_hash_B: Tensor, epoch: int) -> Tensor:
        """The weak view alone, normalised: how labelled tiles are augmented."""
        (weak,) = self._make(tiles_BHWC, key_hash_B, epoch, normalised=True, names=("weak",))
        return weak

    def strong(self, tiles_BHWC: Tensor, key_hash_B: Tensor, epoch: int) -> Tensor:
        """The strong view alone, normalised."""
        (strong,) = self._make(tiles_BHWC, key_hash_B, epoch, normalised=True, names=("strong",))
        return strong

    def raw(self, tiles_BHWC: Tensor, key_hash_B: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """The same views in [0, 1], not normalised: what people look at."""
        strong, weak = self._make(tiles_BHWC, key_hash_B, epoch, normalised=False)
        return strong, weak

    @torch.no_grad()
    def _make(
        self,
        tiles: Tensor,
        key_hash: Tensor,
        epoch: int,
        *,
        normalised: bool,
        names: Sequence[Literal["strong", "weak"]] = ("strong", "weak"),
    ) -> list[Tensor]:
        if len(tiles) != len(key_hash):
            raise ValueError(f"{len(tiles)} tiles and {len(key_hash)} key hashes: give one a tile")
        side = self.image_size
        shape, device = (len(tiles), 3, side, side), tiles.device
        made = [torch.empty(shape, device=device, memory_format=torch.channels_last) for _ in names]
        # Parameters are drawn on the CPU: the same bits for every device, and no waiting to learn who drew what.
        draws = [Draws(key_hash.cpu(), seed=self.seed, epoch=epoch, view=name) for name in names]
        renders = [self.recipe.strong if name == "strong" else self.recipe.weak for name in names]
        for rows in self._chunks(tiles):
            images = to_planes(tiles[rows])
            for out, render, drawn in zip(made, renders, draws, strict=True):
                view = render(images, drawn.rows(rows))
                if normalised:
                    normalise_(view, self.mean, self.std)
                out[rows].copy_(view)
        return made

    def _chunks(self, tiles: Tensor) -> Iterator[slice]:
        budget = _CHUNK_CPU if tiles.device.type == "cpu" else _CHUNK_DEVICE
        chunk = max(4, budget // (3 * max(tiles.shape[1] * tiles.shape[2] // 4, self.image_size**2)))
        return (slice(start, start + chunk) for start in range(0, len(tiles), chunk))
