"""``ca2cl shard``: tiles to WebDataset tars, an index and a manifest.

What goes into which shard is fixed by a plan before the first byte is written: a seeded shuffle of the listing, cut
every ``samples_per_shard``. Processes then write shards independently, so the result does not depend on their number,
and a run that was killed takes up the shards that its plan still lacks. Index and manifest come last: a folder without
a manifest is unfinished.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ca2cl.common.console.progress import ProgressBar
from ca2cl.common.console.summary import closing
from ca2cl.common.files import replacing, write_atomic, writing
from ca2cl.common.job_dir import JobDir, changed
from ca2cl.data.shards.config import ShardConfig
from ca2cl.data.shards.index import (
    INDEX_NAME,
    MANIFEST_NAME,
    SCHEMA_VERSION,
    Manifest,
    ShardIndex,
    digest_of,
    write_index,
)
from ca2cl.data.shards.samples import ShardInfo, ShardSamples
from ca2cl.data.shards.writer import (
    PLAN_FOLDER,
    REMEDY,
    Packing,
    image_size,
    make_shard,
    read_sidecar,
    shard_path,
    sidecar_path,
)
from ca2cl.data.sources.base import Source, SourceOptions
from ca2cl.data.sources.choose import open_source
from ca2cl.data.sources.groups import RegroupedSource
from ca2cl.errors import InputError
from ca2cl.runtime.lifetime import processes_can_share
from ca2cl.slides.config import SlideOptions, check_installed, slide_settings

if TYPE_CHECKING:
    from ca2cl.slides.collection import SlideJob

_SIZED_TILES = 32  # enough for the usual size to be the most frequent where edge tiles are smaller
SKIPPED_NAME = "skipped.txt"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """Assignment of tiles to shards: ``order`` (N,) holds row numbers of the source."""

    order: npt.NDArray[np.int64]
    packing: Packing

    def shards(self) -> list[npt.NDArray[np.int64]]:
        """Row numbers in the source of every shard's tiles, in their order in the tar."""
        step = self.packing.config.samples_per_shard
        return [self.order[start : start + step] for start in range(0, len(self.order), step)]


def run(config: ShardConfig) -> int:
    """Shard ``config.source`` into ``config.out``; returns the exit code.

    Raises:
        InputError: bad source, bad tile, or a folder that cannot be written or holds something else.
    """
    started = time.monotonic()
    out = Path(config.out)
    slides = _slides(config) if config.mpp is not None else None
    options = SourceOptions(**{name: getattr(config, name) for name in SourceOptions.__dataclass_fields__})
    source: Source | None = open_source(config.source, options) if slides is None else None
    if source is not None and config.groups is not None:
        source = RegroupedSource(source, config.groups)
    job = job_dir(out)
    with job.locked(0.0):
        listed = slides or source
        assert listed is not None
        digest, about = identify(listed, config)
        record = {"digest": digest, "about": about}
        if not job.check(record):
            job.write(record)
        manifest = finished(out)
        if manifest is not None:
            if slides is not None:
                slides.check_unchanged()
            sys.stdout.write(f"{out}: already complete\n")
            _summarise(manifest, None, out)
            return 0
        if slides is not None:
            source, config = _cut(slides, job, config), replace(config, encode="keep", check="header")
        assert source is not None
        _warn_of_ungrouped(source)
        plan = make_plan(source, config)
        infos = _write_shards(out, plan, source)
        manifest = _finish(out, plan, source, infos)
        if slides is not None:
            slides.clear()
    _summarise(manifest, time.monotonic() - started, out)
    return 0


def _slides(config: ShardConfig) -> SlideJob:
    check_installed()
    from ca2cl.slides.collection import SlideJob

    form = "jpeg" if config.encode == "keep" else config.encode
    folder = Path(config.out) / PLAN_FOLDER / "slides"
    return SlideJob(config.source, config.split, config, folder, seed=config.seed, form=form, quality=config.quality)


def _cut(slides: SlideJob, job: JobDir, config: ShardConfig) -> Source:
    """The tiles of slides. A job without any leaves its folder to one with other settings."""
    from ca2cl.slides.collection import NoTiles

    try:
        return slides.cut(job.path, config.workers)
    except NoTiles:
        slides.clear()
        job.withdraw()
        raise


def _warn_of_ungrouped(source: Source) -> None:
    if source.ungrouped:
        first = ", ".join(tile.name for tile in source.tiles(source.ungrouped[:3]))
        logger.warning(
            "%d of %d tiles have no slide or patient (%s%s); each counts as a slide of its own; mend "
            "group_pattern or group_column if they should have one",
            len(source.ungrouped),
            len(source),
            first,
            " first" if len(source.ungrouped) > 3 else "",
        )


def identify(source: Source | SlideJob, config: ShardConfig) -> tuple[str, dict[str, Any]]:
    """Digest of what decides about a finished shard's bytes, and the settings by name."""
    options = asdict(config)
    # these do not change a byte of a finished shard, so a run that met a bad tile may go on with other ones
    for name in (
        "source",
        "out",
        "workers",
        "check",
        "bad",
        "check_classes",
        "groups",
        *SlideOptions.__dataclass_fields__,
    ):
        del options[name]
    identity = json.dumps(
        [source.name, source.digest, source.classes, options | slide_settings(config)], sort_keys=True
    )
    digest = hashlib.sha256(identity.encode()).hexdigest()
    options |= slide_settings(config, defaults=config.mpp is not None)
    facts = {"source": source.name, "tiles": source.digest[:12], "classes": " ".join(source.classes)}
    return digest, options | facts


def make_plan(source: Source, config: ShardConfig) -> Plan:
    """Fix the content of every shard, and the size that all tiles must have."""
    words = np.random.Philox(key=config.seed).random_raw(len(source))
    order = np.argsort(words, kind="stable").astype(np.int64)
    size, reference = (None, "") if config.resize is not None else _usual_size(source, order[:_SIZED_TILES])
    packing = Packing(
        config=config, source=source.name, classes=tuple(source.classes), tile_size=size, reference=reference
    )
    return Plan(order, packing)


def _usual_size(source: Source, rows: npt.NDArray[np.int64]) -> tuple[tuple[int, int], str]:
    """The most frequent height and width of these tiles, and the name of a tile that has it."""
    found: dict[tuple[int, int], list[str]] = {}
    errors = []
    for tile in source.tiles(rows):
        where = source.reader.where(tile)
        try:
            found.setdefault(image_size(source.reader.read(tile), where), []).append(where)
        except InputError as error:  # writing its shard meets the tile again, and stops there or skips it
            errors.append(error)
    if not found:
        raise errors[0]
    size = max(found, key=lambda size: len(found[size]))
    return size, found[size][0]


def job_dir(out: Path) -> JobDir:
    """The folder as a job's."""
    return JobDir(
        out, f"{PLAN_FOLDER}/plan.json", _differences, foreign=(MANIFEST_NAME, "*.tar"), setting="out", remedy=REMEDY,
        lock=f"{PLAN_FOLDER}/lock", forks=False, temporaries=("", PLAN_FOLDER),
    )  # fmt: skip


def _differences(first: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    if first["digest"] == now["digest"]:
        return []
    return changed(first.get("about", {}), now["about"]) or ["another source or other options"]


def finished(out: Path) -> Manifest | None:
    """The manifest if the folder is complete and undamaged; else the manifest is removed, and None."""
    path = out / MANIFEST_NAME
    if not path.exists():
        return None
    try:
        index = ShardIndex(out)
        index.verify()
        return index.manifest
    except InputError as error:
        logger.warning("%s", error)
    with writing(path, REMEDY):
        path.unlink()
    return None


def _write_shards(out: Path, plan: Plan, source: Source) -> list[ShardInfo]:
    """Write all shards; their infos in shard order."""
    infos: dict[int, ShardInfo] = {}
    shards = plan.shards()
    with ProgressBar(total=len(source), unit="tile", desc="shard") as bar:
        for shard, info in _written(out, plan, source, shards):
            infos[shard] = info
            bar.update(len(shards[shard]))
    return [infos[shard] for shard in range(len(shards))]


def _written(
    out: Path, plan: Plan, source: Source, shards: Sequence[npt.NDArray[np.int64]]
) -> Iterator[tuple[int, ShardInfo]]:
    tiles = (source.tiles(rows) for rows in shards)
    workers = min(plan.packing.config.workers, len(shards))
    if workers > 1 and processes_can_share():
        from ca2cl.data.shards.pool import write_shards

        return write_shards(out, tiles, len(shards), source.reader, plan.packing, workers)
    return enumerate(
        make_shard(shard_path(out, number), some, source.reader, plan.packing) for number, some in enumerate(tiles)
    )


class _Parts:
    """Every shard's samples, read from its sidecar one at a time: an index may be larger than memory."""

    def __init__(self, sidecars: Sequence[Path]) -> None:
        self._sidecars = sidecars

    def __iter__(self) -> Iterator[tuple[ShardInfo, ShardSamples]]:
        for packed in map(read_sidecar, self._sidecars):
            yield packed.info, packed.samples


def _finish(out: Path, plan: Plan, source: Source, infos: Sequence[ShardInfo]) -> Manifest:
    """Write index and manifest, in this order: a folder with a manifest is complete."""
    counts = np.zeros(len(source.classes), np.int64)
    skipped: list[str] = []
    turned = 0
    sidecars = [sidecar_path(out, info.name) for info in infos]
    for packed in map(read_sidecar, sidecars):
        labels = packed.samples.label
        counts += np.bincount(labels[labels >= 0], minlength=len(counts))
        skipped += packed.skipped
        turned += packed.turned
    if len(skipped) == len(source):
        raise InputError(f"{out}: every tile was skipped, the first because of {skipped[0]}")
    with writing(out / SKIPPED_NAME, REMEDY):
        (out / SKIPPED_NAME).unlink(missing_ok=True)
    if turned:
        logger.warning("%d tiles say that they are to be shown turned (EXIF orientation); they stay as stored", turned)
    if skipped:
        logger.warning("%d tiles skipped, listed in %s", len(skipped), out / SKIPPED_NAME)
        write_atomic(out / SKIPPED_NAME, "\n".join([*skipped, ""]).encode(), REMEDY)
    with writing(out / INDEX_NAME, REMEDY), replacing(out / INDEX_NAME) as file:
        write_index(file, _Parts(sidecars))
    manifest = _manifest(plan, source, infos, counts.tolist())
    write_atomic(out / MANIFEST_NAME, json.dumps(asdict(manifest), indent=2).encode(), REMEDY)
    for sidecar in sidecars:
        with suppress(OSError):  # the index now has all of it
            sidecar.unlink()
    return manifest


def _manifest(plan: Plan, source: Source, infos: Sequence[ShardInfo], counts: Sequence[int]) -> Manifest:
    packing = plan.packing
    size = packing.tile_size or (packing.config.resize, packing.config.resize)
    tile_size = [int(side) for side in size if side is not None]
    return Manifest(
        schema_version=SCHEMA_VERSION,
        classes=list(source.classes),
        counts=dict(zip(source.classes, counts, strict=True)),
        tile_size=tile_size,
        source=source.name,
        encode=packing.config.encode,
        samples=sum(info.samples for info in infos),
        shards=len(infos),
        bytes=sum(info.bytes for info in infos),
        digest=digest_of(source.classes, tile_size, infos),
    )


def _summarise(manifest: Manifest, seconds: float | None, out: Path) -> None:
    height, width = manifest.tile_size
    classes = " ".join(f"{name}={count}" for name, count in manifest.counts.items()) or "none (unlabelled)"
    if manifest.counts and (bare := manifest.samples - sum(manifest.counts.values())):
        classes += f", {bare} unlabelled"
    lines = [
        f"tiles    {manifest.samples} of {width} x {height} px",
        f"classes  {classes}",
        f"shards   {manifest.shards}, {manifest.bytes / 1e6:.1f} MB",
    ]
    if seconds is not None:
        lines.append(f"rate     {manifest.samples / max(seconds, 1e-9):.0f} tiles/s in {seconds:.1f} s")
    sys.stdout.write("\n".join([*lines, f"digest   {manifest.digest}", ""]))
    train = ["ca2cl", "pretrain", "--recipe", "crc5_small", "--data.shards", out, "--run.output_dir", "runs/first"]
    made = f"shards of {manifest.samples} tiles"
    sys.stdout.write(closing(made, out, ["ca2cl", "doctor", "--shards", out], train))
