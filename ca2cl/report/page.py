"""Assemble the page; a section without material says why."""

from __future__ import annotations

import base64
import hashlib
import logging
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from ca2cl import __version__
from ca2cl.errors import InputError
from ca2cl.evaluation.clusters import cluster
from ca2cl.methods.base import Method
from ca2cl.methods.chance import chance_levels
from ca2cl.methods.registry import DEFAULT, known_method
from ca2cl.registry.resolve import ResolvedEncoder, resolve_encoder
from ca2cl.report import run_summary as facts
from ca2cl.report.config import ReportConfig
from ca2cl.report.curves import HEIGHT, WIDTH, counts, panels
from ca2cl.report.embedding_map import draw_map
from ca2cl.report.images import jpeg_uri, layout, sprites
from ca2cl.report.material import RunMaterial
from ca2cl.report.neighbours import retrieve
from ca2cl.report.places.slide_maps import draw_slides
from ca2cl.report.results import Result, results
from ca2cl.report.shards import Shown, other_shards, sheet, training_shards, unreadable
from ca2cl.report.tiles import Tiles, read_tiles

logger = logging.getLogger(__name__)
_GRID_TILES = 12
_SIDE, _EDGE = 560, 20  # of the map, in its own units
_TEMPLATES = "templates"
_QUALITY = 80
_GAPS = ("curves", "shards", "encoder", "views", "labels", "results")
_COLOURS = 20  # ten, filled and hollow


@dataclass(frozen=True)
class Page:
    """The page, and what it is short of."""

    html: str
    gaps: list[str]
    tiles: int


def build(config: ReportConfig, material: RunMaterial, device: torch.device) -> Page:
    """Gather every section's material and render the page.

    Raises:
        InputError: shards that were named cannot be read, or the store went away.
    """
    gaps = dict.fromkeys(_GAPS, "")
    trained_on, other = training_shards(config, material, gaps), other_shards(config, material)
    if other:
        gaps["shards"] = ""
    shown, sheet_of = other or trained_on, trained_on or other
    found = _encoder(material, gaps)
    tiles = _tiles(config, found, shown, device, gaps) if found and shown else None
    method = known_method(material.params.get("method.name", DEFAULT))
    found_results = _results(material, gaps)
    context: dict[str, Any] = {
        "run": material, "status_note": facts.status_note(material), "header": facts.header(material, found),
        "panels": _panels(material, method, gaps), "width": WIDTH, "height": HEIGHT,
        "counts": counts(material.lines, method),
        "sheet": sheet(config, material, sheet_of, gaps) if sheet_of else "", "sheet_of": sheet_of,
        "tiles": tiles, "shown": shown, "results": found_results,
        "verdicts": _first_verdicts(found_results),
        "lineage": facts.lineage(material, found), "drift": facts.drift(material),
        "configuration": facts.configuration(material), "seed": config.seed, "version": __version__, "gaps": gaps,
        "colours": _COLOURS, **(_tile_sections(config, tiles, shown) if tiles and shown else {}),
    }  # fmt: skip
    if tiles and shown and not tiles.labelled:
        gaps["labels"] = (
            f"{shown.name} has no labels, so classes, purity and NMI are not known; `ca2cl shard` of a tree with one "
            "folder a class, or of slides with labels, makes labelled shards; `--test SHARDS` shows them"
        )
    return Page(_render(context), [gap for gap in gaps.values() if gap], len(tiles) if tiles else 0)


def _encoder(material: RunMaterial, gaps: dict[str, str]) -> ResolvedEncoder | None:
    try:
        return resolve_encoder(material.encoder, tracking_uri=material.store.uri if material.store else None)
    except InputError as error:
        gaps["encoder"] = f"no encoder to look at tiles with ({error}); then run `ca2cl report` again"
        return None


def _tiles(
    config: ReportConfig, found: ResolvedEncoder, shown: Shown, device: torch.device, gaps: dict[str, str]
) -> Tiles | None:
    try:
        return read_tiles(
            found, shown.root, shown.index, count=config.tiles, seed=config.seed, device=device,
            workers=config.workers, cache_dir=config.cache_dir, test=shown.test and not shown.trained_on,
        )  # fmt: skip
    except InputError as error:
        unreadable(shown, error, gaps)
        return None


def _panels(material: RunMaterial, method: type[Method], gaps: dict[str, str]) -> list[Any]:
    chance = chance_levels(method, material.params)
    found = panels(material.lines, method, material.watched, chance) if material.lines else []
    if not found:
        gaps["curves"] = (
            "no training line: the run took no step yet (or was imported), or its numbers were never sent; "
            "`ca2cl sync RUN_DIR` sends them"
        )
    return found


def _results(material: RunMaterial, gaps: dict[str, str]) -> list[Result]:
    if material.store is None:
        gaps["results"] = f"downstream results are in the store, which cannot be used ({material.fault})"
        return []
    found = results(material)
    if not found:
        gaps["results"] = (
            f"no downstream run names this run; `ca2cl probe --encoder {material.run_id} --train SHARDS --test SHARDS` "
            "or `ca2cl finetune` makes one"
        )
    return found


def _first_verdicts(found: list[Result]) -> dict[str, str]:
    """What the newest run of every kind shows, with its kind."""
    newest: dict[str, str] = {}
    for result in found:
        if result.verdicts:
            newest.setdefault(result.kind, " ".join(result.verdicts))
    return newest


def _tile_sections(config: ReportConfig, tiles: Tiles, shown: Shown) -> dict[str, Any]:
    """Neighbours, map, clusters and slides."""
    logger.info("neighbours, clusters and map of %d tiles", len(tiles))
    clustering = cluster(tiles.features_ND, tiles.labels_N, config.clusters, config.seed)
    placed = draw_map(tiles.features_ND, config.seed)
    return {
        "retrieval": retrieve(tiles, config.seed),
        "clustering": clustering,
        "of_colours": cluster(tiles.colours_ND, tiles.labels_N, config.clusters, config.seed),
        "slide_maps": draw_slides(tiles.places, shown.index.root) if tiles.places else [],
        "grid_tiles": _GRID_TILES,
        "map": placed,
        "places": (_EDGE + placed.xy_N2 * _SIDE).round(1).tolist(),
        "side": _SIDE + 2 * _EDGE,
        "sprites": sprites(tiles.thumbs_NTTC),
        "map_data": {
            **layout(),
            "classes": tiles.classes,
            "labels": tiles.labels_N.tolist(),
            "clusters": clustering.assignments_N.tolist(),
            "keys": tiles.keys,
        },
        "picture": lambda row: jpeg_uri(tiles.thumbs_NTTC[row], _QUALITY),
        "present": sorted({int(label) for label in tiles.labels_N if label >= 0}),
    }


def _render(context: dict[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("ca2cl.report", _TEMPLATES), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    script = (resources.files("ca2cl.report") / _TEMPLATES / "map.js").read_text(encoding="utf-8")
    # The page runs this script and no other: not even one that a class name would bring in past the escaping.
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html").render(context, script=script, allowed=allowed)
