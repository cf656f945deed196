"""Choose the shards whose tiles are shown, and render their views."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ca2cl.common.scratch import scratch_folder
from ca2cl.config import ViewsConfig
from ca2cl.data.remote.reader import is_remote, open_index
from ca2cl.data.shards.index import ShardIndex
from ca2cl.errors import InputError
from ca2cl.report import run_summary as facts
from ca2cl.report.config import ReportConfig
from ca2cl.report.images import jpeg_uri
from ca2cl.report.material import RunMaterial
from ca2cl.views.contact_sheet import run_sheet

_TILES = 6
_REMEDY = "give `--shards SHARDS` or `--test SHARDS`"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shown:
    """Shards that a page shows tiles of."""

    root: str
    name: str
    """Name that the user or the run gives them."""
    index: ShardIndex
    trained_on: bool | None
    """By their digest, the run was trained on them; None where that is not known."""
    named: bool
    """The user named them: a fault in them is then an error, and not a gap."""
    test: bool = False
    """They are shown as tiles that the encoder has not seen."""


def training_shards(config: ReportConfig, material: RunMaterial, gaps: dict[str, str]) -> Shown | None:
    """The run's shards: those that the user named, or its own where they still are.

    Raises:
        InputError: those that the user named cannot be read.
    """
    if config.shards:
        return _opened(config.shards, config.shards, material, config, named=True)
    own = material.params.get("data.shards", "")
    if not own:
        gaps["shards"] = f"the run does not say which shards it was trained on; {_REMEDY}"
        return None
    places = [own] if is_remote(own) else [str(base / own) for base in material.bases()]
    there = [place for place in places if is_remote(place) or Path(place).exists()]
    try:
        if not there:
            raise InputError(f"{own}: not there")
        return _opened(there[0], own, material, config, named=False)
    except InputError as error:
        gaps["shards"] = f"the run's own shards cannot be read ({error}); {_REMEDY}"
        return None


def other_shards(config: ReportConfig, material: RunMaterial) -> Shown | None:
    """The shards that the user wants to see in place of the run's; None where there are none.

    Raises:
        InputError: they cannot be read.
    """
    if not config.test:
        return None
    shown = replace(_opened(config.test, config.test, material, config, named=True), test=True)
    if shown.trained_on:
        logger.warning("LEAK: the encoder was trained on %s; the page says little about new tiles", shown.name)
    return shown


def _opened(place: str, name: str, material: RunMaterial, config: ReportConfig, *, named: bool) -> Shown:
    index = open_index(place, config.cache_dir)
    if not len(index):
        raise InputError(f"{name}: holds no tile; write the folder again with `ca2cl shard`")
    known = facts.trained_digest(material)
    return Shown(place, name, index, index.manifest.digest == known if known else None, named)


def unreadable(shown: Shown, error: InputError, gaps: dict[str, str]) -> None:
    """Note that the tiles of a run's own shards cannot be read; those that the user named are an error."""
    if shown.named:
        raise error
    gaps["shards"] = f"the run's own shards cannot be read ({error}); {_REMEDY}"


def sheet(config: ReportConfig, material: RunMaterial, shown: Shown, gaps: dict[str, str]) -> str:
    """The views of a few tiles as a picture, with the run's own settings and seed; empty where those are not known.

    Args:
        config: the page's settings.
        material: what is known of the run.
        shown: the shards to take tiles from.
        gaps: filled with why there is no sheet.

    Raises:
        InputError: tiles of shards that the user named cannot be read.
    """
    held = facts.nested(material)
    try:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in held["views"].items()}
        views = ViewsConfig(**fields)
        size, seed = int(held["data"]["image_size"]), int(held["run"]["seed"])
    except (KeyError, TypeError, ValueError, AttributeError):
        gaps["views"] = (
            "the run has no readable config.yaml; `ca2cl doctor --views SHARDS OUT.png` draws views of a recipe"
        )
        return ""
    with scratch_folder() as scratch:
        try:
            path = run_sheet(
                shown.root, f"{scratch}/views.png", config=views, image_size=size, count=_TILES, seed=seed,
                cache_dir=config.cache_dir,
            )  # fmt: skip
        except InputError as error:
            unreadable(shown, error, gaps)
            return ""
        with Image.open(path) as image:
            return jpeg_uri(np.asarray(image.convert("RGB")))
