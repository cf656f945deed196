"""Two views of a tile, made on the device that the tile lies on (DESIGN.md sections 3 and 4)."""

from __future__ import annotations

from collections.abc import Sequence

from ca2cl.config import ViewsConfig
from ca2cl.errors import InputError
from ca2cl.views.batch import Recipe, Views
from ca2cl.views.crop import CropRecipe

__all__ = ["Recipe", "Views", "build_views"]


def build_views(
    config: ViewsConfig, image_size: int, *, mean: Sequence[float], std: Sequence[float], seed: int
) -> Views:
    """The views that a configuration asks for.

    Args:
        config: which recipe, and its settings.
        image_size: side of the views in pixels.
        mean: of the encoder's input channels, in [0, 1].
        std: of the channels.
        seed: the run's seed.
    """
    if config.recipe != "crop":
        raise InputError(f"views.recipe is {config.recipe!r}: only 'crop' is built so far")
    recipe: Recipe = CropRecipe(image_size, scale=config.crop_scale, strength=config.strength)
    return Views(recipe, image_size, mean=mean, std=std, seed=seed)
