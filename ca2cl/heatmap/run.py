"""``ca2cl heatmap``: embed and classify tiles of slides; draw maps.

Legend: N tiles of a slide, D features, K classes.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ca2cl import __version__
from ca2cl.common.console.summary import closing
from ca2cl.common.files import replacing, writing
from ca2cl.common.tables import fitted
from ca2cl.errors import InputError
from ca2cl.evaluation.embed.config import EmbedConfig
from ca2cl.evaluation.embed.run import run as embed
from ca2cl.evaluation.embed.writer import slides_path
from ca2cl.evaluation.report import write_json
from ca2cl.heatmap.class_map import ClassMap, average
from ca2cl.heatmap.clusters import find_clusters
from ca2cl.heatmap.config import HeatmapConfig
from ca2cl.heatmap.picture import Legend, draw_map, palette
from ca2cl.heatmap.scorer import Scorer, find_scorer
from ca2cl.heatmap.vectors import SlideVectors, read_slides
from ca2cl.runtime.distributed import Ranks
from ca2cl.slides.config import check_installed, slide_options
from ca2cl.slides.listing import list_slides
from ca2cl.slides.records import SlideRecord, read_rows, without_shared_folder

Floats = npt.NDArray[np.float64]
logger = logging.getLogger(__name__)
SCHEMA_VERSION = 1
VECTORS, ABOUT = "vectors.parquet", "heatmap.json"
_REMEDY = "free some space, or give a folder you can write"
_DIGITS = 6
_NEAR = 0.02
"""Relative difference of two resolutions that is not worth a warning."""


def run(config: HeatmapConfig) -> int:
    """Write the maps of all slides; returns the exit code.

    Raises:
        InputError: no such run, an encoder without classes, no tile, or a folder that cannot be written.
    """
    check_installed()
    ranks = Ranks()
    scorer = ranks.together(lambda: find_scorer(config))
    mpp = config.mpp or scorer.found.card.mpp
    if mpp is None:
        raise InputError("mpp is not set, and the encoder's card states none; give --mpp, such as 0.5 for 20x")
    if ranks.rank == 0:
        for line in mismatches(scorer, config.tile, mpp):
            logger.warning("%s", line)
        with writing(Path(config.out), _REMEDY):
            Path(config.out).mkdir(parents=True, exist_ok=True)
    ranks.share(None)
    settings = embedding(config, scorer, mpp)
    embed(settings, scorer.found)
    if ranks.rank == 0:
        _write(config, scorer, Path(settings.out), mpp)
    return 0


def embedding(config: HeatmapConfig, scorer: Scorer, mpp: float) -> EmbedConfig:
    """The settings of the embedding of the slides' tiles."""
    return EmbedConfig(
        **{**slide_options(config), "mpp": mpp},
        encoder=config.run,
        source=config.source,
        out=str(Path(config.out) / VECTORS),
        tokens=() if scorer.pooling == "default" else (scorer.pooling,),
        batch_size=config.batch_size,
        workers=config.workers,
        image_size=scorer.image_size,
        device=config.device,
        precision=config.precision,
        overwrite=config.overwrite,
        unlabelled=True,
        split=config.split,
        seed=config.seed,
        tracking=config.tracking,
    )


def mismatches(scorer: Scorer, tile: int, mpp: float) -> list[str]:
    """Warnings where the encoder sees tiles of another size or resolution than those that it was trained on.

    Args:
        scorer: encoder and classifier.
        tile: side in pixels of the tiles.
        mpp: their micrometres a pixel.
    """
    side, trained, card = scorer.image_size, scorer.found.card.mpp, scorer.card
    seen = mpp * tile / side
    found = []
    if card is not None and card.tile_size != (tile, tile):
        height, width = card.tile_size
        found.append(f"tile is {tile}: the probe was trained on tiles of {width} x {height} pixels; use --tile {width}")
    elif card is None and trained is None and tile != side:
        found.append(
            f"tile is {tile}: the encoder's input has {side} pixels, so that it sees {seen:.3g} micrometres a pixel; "
            "give the tile and the mpp that it was trained on"
        )
    if trained is not None and abs(seen / trained - 1) > _NEAR:
        found.append(
            f"mpp is {mpp:g}: the encoder sees {seen:.3g} micrometres a pixel (tiles of {tile} pixels as {side}), and "
            f"was trained at {trained:g}; use --mpp {trained * side / tile:.3g}"
        )
    return found


class _Writer:
    """Writes the files of one slide after another into a folder."""

    def __init__(self, config: HeatmapConfig, scorer: Scorer, mpp: float) -> None:
        self._config, self._scorer, self._mpp = config, scorer, mpp
        self._clusters = config.clusters is not None
        self.colours = palette(len(scorer.classes))
        self._files = {slide.name: slide for slide in list_slides(config.source, config.split).slides}
        self._shown = dict(zip(self._files, without_shared_folder(list(self._files)), strict=True))

    def write(self, found: SlideVectors, record: SlideRecord) -> dict[str, Any]:
        """Write picture and GeoJSON of a slide; what ``heatmap.json`` says of it."""
        names, scores_NK = self._scorer.classes, self._scorer.probabilities(found.vectors_ND)
        class_map = average(found.boxes_N4, scores_NK)
        shares = class_map.shares().tolist()
        title = self._shown[found.slide]
        stem = title.replace("/", "~")
        self._write_geojson(f"{stem}.geojson", found.boxes_N4, scores_NK, class_map)
        legend = Legend(
            title, names, self.colours, shares, self._notes(len(found.boxes_N4), record), not self._clusters
        )
        self._write_picture(f"{stem}.png", class_map, record, legend)
        tiles = np.bincount(scores_NK.argmax(axis=1), minlength=len(names)).tolist()
        return {
            "slide": found.slide,
            "png": f"{stem}.png",
            "geojson": f"{stem}.geojson",
            "tiles": dict(zip(names, tiles, strict=True)),
            "shares": dict(zip(names, shares, strict=True)),
        }

    def _notes(self, tiles: int, record: SlideRecord) -> list[str]:
        tile, mpp = self._config.tile, self._mpp
        how = "k-means clusters of its vectors" if self._clusters else "the paler a colour, the less certain"
        return [
            f"{tiles} of {record.grid} tiles of {tile * mpp:.4g} µm ({tile} pixels of {mpp:g} µm)",
            f"{self._scorer.name}: {how}",
        ]

    def _write_geojson(self, name: str, boxes_N4: Floats, scores_NK: Floats, class_map: ClassMap) -> None:
        from ca2cl.slides.regions.write import write_geojson

        names, index_N = self._scorer.classes, scores_NK.argmax(axis=1)
        if self._config.geojson == "regions":  # of the averages, so that they do not overlap where tiles do
            boxes_N4, index_N, scores_NK = class_map.cells()
        measured = (
            {}
            if self._clusters
            else {f"probability {one}": scores_NK[:, k].round(_DIGITS) for k, one in enumerate(names)}
        )
        write_geojson(
            Path(self._config.out) / name,
            boxes_N4,
            index_N,
            dict(zip(names, self.colours, strict=True)),
            measured,
            merge=self._config.geojson == "regions",
            counted="cells" if self._config.overlap else "tiles",
        )

    def _write_picture(self, name: str, class_map: ClassMap, record: SlideRecord, legend: Legend) -> None:
        from ca2cl.heatmap.thumbnail import read_thumbnail

        assert record.mpp is not None
        thumbnail_HWC, scale = read_thumbnail(self._files[record.slide], record.mpp, self._config.side)
        picture = draw_map(thumbnail_HWC, class_map, scale, record.mpp * scale, legend)
        path = Path(self._config.out) / name
        with writing(path, _REMEDY), replacing(path) as file:
            picture.save(file, "PNG")


def _write(config: HeatmapConfig, scorer: Scorer, vectors: Path, mpp: float) -> None:
    if config.clusters is not None:
        scorer = scorer.with_clusters(find_clusters(vectors, config.clusters, config.seed))
    writer = _Writer(config, scorer, mpp)
    records = {record.slide: record for record in read_rows(slides_path(vectors))}
    slides = read_slides(vectors, config.overlap / config.tile)
    rows = [writer.write(found, records[found.slide]) for found in slides]
    about = {
        "schema_version": SCHEMA_VERSION,
        "kind": "heatmap",
        "ca2cl": __version__,
        "run": config.run,
        "encoder": scorer.found.describe(),
        "classes": dict(zip(scorer.classes, writer.colours, strict=True)),
        "clusters": config.clusters,
        "mpp": mpp,
        "tile": config.tile,
        "overlap": config.overlap,
        "slides": rows,
        "failed": {record.slide: record.error for record in records.values() if record.error is not None},
    }
    out = Path(config.out)
    write_json(out / ABOUT, about)
    shares = [[f"{100 * share:.1f} %" for share in row["shares"].values()] for row in rows]
    shown = without_shared_folder([row["slide"] for row in rows])
    tiles = [str(sum(row["tiles"].values())) for row in rows]
    cells = [[name, count, *some] for name, count, some in zip(shown, tiles, shares, strict=True)]
    sys.stdout.write(fitted(["slide", "tiles", *scorer.classes], cells))
    sys.stdout.write(f"pictures, GeoJSON and {ABOUT} of {len(rows)} slide{'s' * (len(rows) != 1)} in {out}\n")
    look = "look at the PNG files; QuPath opens the GeoJSON: File > Import objects from file"
    sys.stdout.write(closing(f"maps of {len(rows)} slide{'s' * (len(rows) != 1)}", out, look))
    sys.stdout.flush()
