"""``Views``: the two augmented views of tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ca2cl.config import IMAGENET_MEAN, IMAGENET_STD, ViewsConfig
from ca2cl.data.shards.index import key_hash
from ca2cl.views.build import build_views


class Views:
    """Strong and weak views of tiles, as pre-training makes them.

    The views of a tile are a pure function of the seed, the epoch and the tile's key: the same in any batch, on any
    number of processes, and after a resume. Tiles on a GPU are rendered there.

    Args:
        recipe: ``ca2cl``, the views of the paper; or ``crop``, two random resized crops.
        size: side S of the views in pixels.
        seed: of all draws.
        strength: factor on the colour and stain jitter of ``crop``.
        crop_scale: smallest and largest share of the tile's area that a view of ``crop`` covers.
        mean: of the channels, in [0, 1]; subtracted.
        std: of the channels; divides.
        dtype: of the views: float32, bfloat16 or float16.

    Raises:
        ca2cl.errors.InputError: a ``ValueError`` of one line: a setting out of its range.

    Example:
        >>> views = ca2cl.Views("crop", size=96)
        >>> strong, weak = views(tiles, keys=dataset.keys()[:32])  # tiles: uint8 (32, H, W, 3)
    """

    def __init__(
        self,
        recipe: Literal["ca2cl", "crop"] = "ca2cl",
        size: int = 224,
        *,
        seed: int = 0,
        strength: float = 1.0,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        config = ViewsConfig(recipe=recipe, strength=strength, crop_scale=crop_scale)
        self._views = build_views(config, size, mean=mean, std=std, seed=seed, dtype=dtype)

    def __call__(self, tiles_BHWC: Tensor, keys: Sequence[str] | None = None, epoch: int = 0) -> tuple[Tensor, Tensor]:
        """The strong and the weak view, each (B, 3, S, S) in ``dtype``, on the tiles' device.

        Values are (pixel / 255 - mean) / std: about -2.2 to 2.7 with the default normalisation.

        Args:
            tiles_BHWC: uint8 RGB (B, H, W, 3) in [0, 255].
            keys: of the tiles; None takes their numbers in the batch, so that other batches need another ``epoch``.
            epoch: number of the pass over the data.

        Raises:
            ValueError: another dtype or shape, or not one key a tile.
        """
        return self._views(tiles_BHWC, self._hashes(keys, len(tiles_BHWC)), epoch)

    def pixels(self, tiles_BHWC: Tensor, keys: Sequence[str] | None = None, epoch: int = 0) -> tuple[Tensor, Tensor]:
        """The same views as pictures, uint8 RGB (B, S, S, 3) in [0, 255]; arguments and errors as for the call."""
        return self._views.raw(tiles_BHWC, self._hashes(keys, len(tiles_BHWC)), epoch)

    @staticmethod
    def _hashes(keys: Sequence[str] | None, count: int) -> Tensor:
        return torch.tensor([key_hash(str(key)) for key in (range(count) if keys is None else keys)])
