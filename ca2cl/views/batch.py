"""A decoded batch → its two views."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ca2cl.views.preprocess import normalise, to_planes
from ca2cl.views.random import Draws

# Tiles that are worked on together: few enough that their planes stay in a core's cache, many enough to fill a GPU.
_CHUNK_CPU = 16
_CHUNK_DEVICE = 256


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
        return self._make(tiles_BHWC, key_hash_B, epoch, lambda view: normalise(view, self.mean, self.std))

    def raw(self, tiles_BHWC: Tensor, key_hash_B: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """The same views in [0, 1], not normalised: what people look at."""
        return self._make(tiles_BHWC, key_hash_B, epoch, lambda view: view)

    @torch.no_grad()
    def _make(
        self, tiles: Tensor, key_hash: Tensor, epoch: int, finish: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        if len(tiles) != len(key_hash):
            raise ValueError(f"{len(tiles)} tiles and {len(key_hash)} key hashes: give one a tile")
        side, device = self.image_size, tiles.device
        # Parameters are drawn on the CPU: the same bits for every device, and no waiting for it to learn who drew what.
        key_hash = key_hash.cpu()
        strong, weak = (
            torch.empty(len(tiles), 3, side, side, device=device, memory_format=torch.channels_last) for _ in range(2)
        )
        chunk = _CHUNK_CPU if device.type == "cpu" else _CHUNK_DEVICE
        for start in range(0, len(tiles), chunk):
            rows = slice(start, start + chunk)
            images = to_planes(tiles[rows])
            for out, render, name in ((strong, self.recipe.strong, "strong"), (weak, self.recipe.weak, "weak")):
                draws = Draws(key_hash[rows], seed=self.seed, epoch=epoch, view=name)
                out[rows] = finish(render(images, draws))
        return strong, weak
