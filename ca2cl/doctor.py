"""``ca2cl doctor``: look before you train."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from ca2cl.config import ViewsConfig
from ca2cl.errors import InputError

POSITIONAL = ()


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Draw a sheet of tiles beside the views that training would see: ``ca2cl doctor --views SHARDS OUT.png``."""

    views: tuple[str, str] | None = None
    """Shard folder, and the PNG to write."""
    recipe: str = "ca2cl"
    """View recipe: ca2cl or crop."""
    image_size: int = 224
    """Side of the views in pixels."""
    count: int = 8
    """Tiles on the sheet."""


def run(config: DoctorConfig) -> int:
    """Write the sheet; returns the exit code."""
    from ca2cl.views.sheet import run_sheet

    if config.views is None:
        raise InputError("views is not set: give --views SHARDS OUT.png")
    shards, out = config.views
    recipe = ViewsConfig(recipe=config.recipe)  # type: ignore[arg-type]
    path = run_sheet(shards, out, count=config.count, config=recipe, image_size=config.image_size)
    sys.stdout.write(f"views of {config.count} tiles in {path}\n")
    return 0
