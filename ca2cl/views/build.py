"""Builds the two views of a run (docs/mathematics.md, "Views")."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ca2cl.config import ViewsConfig
from ca2cl.views.batch import Recipe, Views
from ca2cl.views.crop import CropRecipe
from ca2cl.views.paper import PaperRecipe

__all__ = ["Recipe", "Views", "build_views"]


def build_views(
    config: ViewsConfig,
    image_size: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> Views:
    """The views that a configuration asks for.

    Args:
        config: which recipe, and its settings.
        image_size: side of the views in pixels.
        mean: of the encoder's input channels, in [0, 1].
        std: of the channels.
        seed: the run's seed.
        dtype: of the views.
    """
    recipe: Recipe
    if config.recipe == "crop":
        recipe = CropRecipe(image_size, scale=config.crop_scale, strength=config.strength)
    else:
        recipe = PaperRecipe(image_size)
    return Views(recipe, mean=mean, std=std, seed=seed, dtype=dtype)
