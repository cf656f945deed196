"""Draw and render the two views of a batch of tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ca2cl.views.cpu.memory import Spares
from ca2cl.views.draw.random import Draws, row_words
from ca2cl.views.draw.table import Passes, Table, View

VERSION = 2
"""Of what the views are of a seed, an epoch and a key; kept in checkpoints. Runs begun before it was kept have 1."""
_ON_GPU = ("cuda", "meta")  # meta: shapes alone, which take the GPU's way
BOTH: tuple[View, View] = ("strong", "weak")


class Recipe(Protocol):
    """What the strong and the weak view of a tile draw.

    Attributes:
        name: of the recipe.
        size: side S of the views in pixels.
        draw_names: names of the draws that ``draw`` asks for.
    """

    name: str
    size: int
    draw_names: tuple[str, ...]

    def passes(self, view: View) -> Passes:
        """What some tile of a view may draw."""

    def draw(self, draws: Draws, views: Sequence[View], tile_sides: tuple[int, int]) -> Table:
        """The rows of some views, (V, B); their tiles are of (height, width) pixels."""


class Views:
    """Both views of every tile, each a pure function of (seed, epoch, the sample's key).

    A sample's views do not depend on which other tiles are in the batch, nor on the device but for rounding to 8 bits.
    All that a batch draws is drawn on the host, into one table that is copied to the device once (``table``). CPUs
    render by ``cpu``, CUDA devices by ``gpu``; devices without a renderer of their own (mps, xpu) get what the CPU has
    rendered.

    Args:
        recipe: what a view draws.
        mean: of the encoder's input channels, in [0, 1].
        std: of the channels.
        seed: the run's seed.
        dtype: of the views: float32, bfloat16 or float16.
    """

    def __init__(
        self, recipe: Recipe, *, mean: Sequence[float], std: Sequence[float], seed: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.recipe = recipe
        self.seed = seed
        levels = torch.arange(256).expand(3, 256)
        centre, width = (255 * torch.tensor(values).double()[:, None] for values in (mean, std))
        self._spares = Spares()
        self._raw = levels.byte()
        self._normalised = ((levels - centre) / width).to(dtype)

    def __call__(self, tiles_BHWC: Tensor, key_hash_B: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """The strong and the weak view, normalised.

        Args:
            tiles_BHWC: uint8 (B, H, W, 3), RGB, on any device; H and W may differ from S.
            key_hash_B: int64 (B,), one word a sample.
            epoch: number of the pass over the data.

        Returns:
            Two (B, 3, S, S) of ``dtype`` in channels_last order, on the tiles' device.
        """
        strong, weak = self._make(tiles_BHWC, key_hash_B, epoch, BOTH, self._normalised)
        return strong.permute(0, 3, 1, 2), weak.permute(0, 3, 1, 2)

    def weak(self, tiles_BHWC: Tensor, key_hash_B: Tensor, epoch: int) -> Tensor:
        """The weak view alone, normalised: how labelled tiles are augmented."""
        return self._make(tiles_BHWC, key_hash_B, epoch, ("weak",), self._normalised)[0].permute(0, 3, 1, 2)

    def strong(self, tiles_BHWC: Tensor, key_hash_B: Tensor, epoch: int) -> Tensor:
        """The strong view alone, normalised."""
        return self._make(tiles_BHWC, key_hash_B, epoch, ("strong",), self._normalised)[0].permute(0, 3, 1, 2)

    def raw(self, tiles_BHWC: Tensor, key_hash_B: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """The same views before they are normalised, uint8 (B, S, S, 3): what people look at."""
        strong, weak = self._make(tiles_BHWC, key_hash_B, epoch, BOTH, self._raw)
        return strong, weak

    def words(self, key_hash_B: Tensor, epoch: int) -> Tensor:
        """A word for the strong and for the weak view of each tile, int64 (2, B) on the host: a network that leaves out
        parts of itself draws from it (``models.blocks.drop_path``)."""
        return torch.from_numpy(row_words(key_hash_B.cpu().numpy(), seed=self.seed, epoch=epoch, views=BOTH))

    def draw(self, key_hash_B: Tensor, epoch: int, views: Sequence[View], tile_sides: tuple[int, int]) -> Table:
        """What the views of a batch draw, (V, B)."""
        keys = key_hash_B.cpu().numpy()
        draws = Draws(keys, seed=self.seed, epoch=epoch, views=views, names=self.recipe.draw_names)
        return self.recipe.draw(draws, views, tile_sides)

    @torch.no_grad()
    def _make(
        self, tiles: Tensor, key_hash: Tensor, epoch: int, views: Sequence[View], colours: Tensor
    ) -> list[Tensor]:
        """V of (B, S, S, 3); ``colours`` (3, 256) are what the levels become."""
        if tiles.dtype != torch.uint8 or tiles.ndim != 4 or tiles.shape[-1] != 3:
            raise ValueError(f"tiles are {tiles.dtype} {tuple(tiles.shape)}: give uint8 (B, H, W, 3)")
        if len(tiles) != len(key_hash):
            raise ValueError(f"{len(tiles)} tiles and {len(key_hash)} key hashes: give one a tile")
        table = self.draw(key_hash, epoch, views, (tiles.shape[1], tiles.shape[2]))
        if tiles.device.type in _ON_GPU:
            from ca2cl.views.gpu.render import render

            return render(tiles, table, [self.recipe.passes(view) for view in views], colours, self.recipe.size)
        return list(_render_on_cpu(tiles.cpu(), table, colours, self.recipe.size, self._spares).to(tiles.device))


def _render_on_cpu(tiles: Tensor, table: Table, colours: Tensor, size: int, spares: Spares) -> Tensor:
    from ca2cl.views.cpu.render import render  # imports Numba

    # NumPy has no bfloat16: what is not float32 is carried as words of its size.
    carried = {1: torch.uint8, 2: torch.int16, 4: torch.float32}[colours.element_size()]
    numbers = colours.view(carried).numpy()
    out = spares.array((*table.shape, size, size, 3), numbers.dtype)
    render(tiles.contiguous().numpy(), table, numbers, out)
    return torch.from_numpy(out).view(colours.dtype)
