"""Embed a tile set in resumable parts.

Legend: B tiles of a batch, H, W height and width in pixels, S side of the encoder's input, D length of a vector.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ca2cl import __version__
from ca2cl.common.console.progress import ProgressBar
from ca2cl.common.files import check_writable
from ca2cl.common.redact import redact
from ca2cl.data.loading.stream import BadBudget, BadTile
from ca2cl.data.loading.workers import TileWorkers
from ca2cl.data.sources.base import SourceOptions
from ca2cl.errors import InputError
from ca2cl.evaluation.embed.config import EmbedConfig
from ca2cl.evaluation.embed.parts import Part, PartFacts, Parts
from ca2cl.evaluation.embed.patch_tokens import TokenGrid
from ca2cl.evaluation.embed.tiles import Decoded, DecodeRange, Prepare, TileData, TileRow, open_tiles
from ca2cl.evaluation.embed.writer import slides_path
from ca2cl.models.backbone import Backbone
from ca2cl.models.encoder_io import weights_digest
from ca2cl.models.preprocess import preprocess
from ca2cl.registry.resolve import ResolvedEncoder, resolve_encoder
from ca2cl.runtime.device import find_device
from ca2cl.runtime.distributed import Ranks
from ca2cl.runtime.heap import return_freed_memory
from ca2cl.runtime.precision import check_precision
from ca2cl.slides.config import check_installed

if TYPE_CHECKING:
    from ca2cl.evaluation.embed.slides import SlideTiles

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
_NAMED_BAD = 100
_WARNED_BAD = 20


class Numbers(NamedTuple):
    """Of a batch: vectors (B, D), and patch tokens (B, h, w, C) as they are stored."""

    vectors: npt.NDArray[np.float32]
    tokens: npt.NDArray[Any] | None


@dataclass(frozen=True)
class EmbedJob:
    """An embedding that is ready to run on this process's device."""

    config: EmbedConfig
    found: ResolvedEncoder
    data: TileData
    parts: Parts
    device: torch.device
    prepare: Prepare
    slides: SlideTiles | None = None
    """``data``, where these are tiles of slides."""
    seen: Mapping[str, Any] = field(default_factory=dict)
    """Tiles that the encoder was trained on (``find_seen``)."""

    def scanned(self, ranks: Ranks) -> EmbedJob:
        """This job after the scan of its slides, when the number of tiles is known.

        Raises:
            InputError: there are none.
        """
        assert self.slides is not None
        self.slides.scan(ranks, self.config.workers, slides_path(self.out))
        parts = replace(self.parts, tiles=len(self.slides), starts=self.slides.starts)
        return replace(self, parts=parts)

    @property
    def out(self) -> Path:
        """The result."""
        return Path(self.config.out)

    def encode(self, tiles_BHWC: Tensor, resized: Mapping[int, npt.NDArray[np.float32]]) -> Numbers:
        """Vectors (B, D) of tiles, and patch tokens (B, h, w, C) where the settings say so; ``resized`` has the
        encoder's input of those that have another size than usual."""
        autocast = torch.bfloat16 if self.config.precision == "bf16" else torch.float16
        with torch.inference_mode(), torch.autocast(self.device.type, autocast, self.config.precision != "no"):
            x_BCHW = self.prepare(tiles_BHWC.to(self.device, non_blocking=True))
            for place, x_CHW in resized.items():
                x_BCHW[place] = torch.from_numpy(x_CHW).to(self.device)
            features, patches = _features(self.config, self.found.encoder, x_BCHW)
            vectors: npt.NDArray[np.float32] = features.float().cpu().clone().numpy()  # a class token is a view
        self._check_finite("vectors", vectors, " or --precision no" if self.config.precision == "fp16" else "")
        grid = self.parts.grid
        if grid is None or patches is None:
            return Numbers(vectors, None)
        tokens = patches.to(getattr(torch, grid.dtype)).cpu().numpy()  # what does not fit is infinite, and refused
        self._check_finite("patch tokens", tokens, " or --token_dtype float32" if grid.dtype == "float16" else "")
        return Numbers(vectors, tokens)

    def _check_finite(self, what: str, numbers: npt.NDArray[Any], remedy: str) -> None:
        broken = int((~np.isfinite(numbers)).reshape(len(numbers), -1).any(axis=1).sum())
        if broken:
            raise InputError(
                f"{self.found.uri}: gives {what} that are not finite for {broken} of {len(numbers)} tiles; use an "
                f"encoder that converged{remedy}"
            )

    def check_bad(self, bad: int, examples: Sequence[BadTile]) -> None:
        """Refuse to go on with ``bad`` tiles of all that did not decode.

        The share is taken of all tiles of the job and not of those seen, so that it does not matter in which order, or
        in how many processes, they are met.
        """
        if BadBudget(self.config.max_bad_rate).exceeded(bad, len(self.data)):
            named = "; ".join(f"{tile.key}: {tile.reason}" for tile in examples[:3])
            raise InputError(
                f"max_bad_rate is {self.config.max_bad_rate}: at least {bad} of {len(self.data)} tiles do not decode "
                f"({named}); repair them, or raise --max_bad_rate"
            )

    def about(self, bad: Sequence[BadTile]) -> dict[str, Any]:
        """Metadata of the result, without times and the number of processes: the same job gives the same bytes."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "embedding",
            "job": self.parts.digest,
            "identity": dict(self.parts.identity),
            "encoder": self.found.describe(),
            **({"pretraining": dict(self.seen)} if self.seen and self.found.card.manifests else {}),
            **({"pooling": self.config.pooling} if self.config.tokens else {}),
            **({"tokens": self.parts.grid.describe()} if self.parts.grid else {}),
            "data": {
                "source": redact(self.config.source),
                "name": self.data.name,
                "manifest_digest": self.data.manifest_digest,
                "classes": list(self.data.classes),
                **({"slides": self.slides.settings} if self.slides is not None else {}),
                "undecodable": len(bad),
                "undecodable_first": {tile.key: tile.reason for tile in bad[:_NAMED_BAD]},
            },
        }


def open_job(config: EmbedConfig, encoder: ResolvedEncoder | None = None) -> EmbedJob:
    """Find the tiles and the encoder.

    Args:
        config: of the job.
        encoder: what ``config.encoder`` names, where it has been found already.

    Raises:
        InputError: either is not there, or ``out`` cannot be written.
    """
    check_writable(Path(config.out), "out")  # first: encoder and tiles take longer
    device = find_device(config.device)
    check_precision(config.precision, device, "precision")
    out = Path(config.out)
    folder = out.with_name(f"{out.name}.parts")
    slides = _open_slides(config, folder) if config.mpp is not None else None
    data: TileData = _open_tiles(config) if slides is None else slides
    tracking = config.tracking
    found = encoder or resolve_encoder(config.encoder, tracking_uri=tracking.uri, root=tracking.root)
    card = found.card
    size = config.image_size or card.input_size
    found = replace(found, encoder=found.at(size).encoder)  # the card stays what it was
    dim, grid = _shape(config, found, size)
    if grid is not None:  # megabytes of tokens a batch, of which glibc would keep many
        return_freed_memory()
    identity = {
        "ca2cl": __version__,
        "encoder": weights_digest(found.encoder, card.mean, card.std),
        "data": data.digest,
        **({"tiles": len(data)} if slides is None else slides.settings),
        "labels": [config.unlabelled, *data.classes],
        "image_size": size,
        "precision": config.precision,
        "device": device.type,
        "part_size": config.part_size,
        **({"tokens": [*config.tokens, config.token_dtype]} if config.tokens else {}),
    }
    parts = Parts(folder, identity, len(data), config.part_size, dim, grid)
    found.encoder.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    prepare = partial(preprocess, size=size, mean=card.mean, std=card.std)
    return EmbedJob(config, found, data, parts, device, prepare, slides)


def _open_tiles(config: EmbedConfig) -> TileData:
    options = SourceOptions(
        unlabelled=config.unlabelled,
        split=config.split,
        image_column=config.image_column,
        label_column=config.label_column,
    )
    return open_tiles(config.source, config.cache_dir, options)


def _open_slides(config: EmbedConfig, folder: Path) -> SlideTiles:
    check_installed()
    from ca2cl.evaluation.embed.slides import SlideTiles

    return SlideTiles(
        config.source, config.split, config, seed=config.seed, unlabelled=config.unlabelled, folder=folder
    )


def _shape(config: EmbedConfig, found: ResolvedEncoder, size: int) -> tuple[int, TokenGrid | None]:
    """Length of a vector, and the grid of patch tokens where these are written.

    Raises:
        InputError: the encoder has no such tokens.
    """
    if not config.tokens:
        return found.card.feature_dim, None
    if config.pooling != "default":
        found.encoder.check_tokens([config.pooling], config.encoder)
    with torch.inference_mode():
        features, patches = _features(config, found.encoder, torch.zeros(1, 3, size, size))
    if patches is None:
        return features.shape[1], None
    _, height, width, dim = patches.shape
    return features.shape[1], TokenGrid(height, width, dim, config.token_dtype, size)


def _features(config: EmbedConfig, encoder: Backbone, x_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
    """Vectors (B, D) and, where they are written, patch tokens (B, h, w, C) of the encoder's input."""
    if not config.tokens:
        return encoder(x_BCHW), None
    found = encoder.encode(x_BCHW, [config.pooling])
    return found.pooled[config.pooling], found.tokens.patches if "patch" in config.tokens else None


def embed_parts(
    job: EmbedJob, todo: Sequence[int], finished: Mapping[int, PartFacts], ranks: Ranks
) -> tuple[int, float]:
    """Make and write the parts ``todo``, in order; the tiles that it went through, and the seconds that it took.

    Args:
        job: the opened job.
        todo: numbers of parts that this process makes.
        finished: parts that are there already.
        ranks: the processes that share the job.

    Raises:
        InputError: too many bad tiles, vectors that are not finite, a file that cannot be read, or a full disk.
    """
    parts = [job.parts[number] for number in todo]
    progress = _Progress(job, parts, finished, ranks)
    slides = job.slides
    with progress.bar:
        for batch in [parts] if slides is None else slides.batches(parts):
            with contextlib.nullcontext() if slides is None else slides.at_hand(batch):
                _make_all(job, batch, progress)
    return progress.done, time.monotonic() - progress.started


def _requests(job: EmbedJob, part: Part) -> list[tuple[int, int]]:
    """First and last tiles of the part's batches."""
    firsts = range(part.first, part.last, job.config.batch_size)
    return list(itertools.pairwise([*firsts, part.last]))


def _make_all(job: EmbedJob, parts: Sequence[Part], progress: _Progress) -> None:
    requests = [request for part in parts for request in _requests(job, part)]
    rows = max((last - first for first, last in requests), default=1)
    workers = TileWorkers(DecodeRange(job.data, job.prepare), rows, job.data.tile_size, job.config.workers)
    with contextlib.closing(workers.answers(requests)) as answers:
        for part in parts:
            _make(job, part, answers, progress)


def _make(
    job: EmbedJob, part: Part, answers: Generator[tuple[Decoded, Tensor], None, None], progress: _Progress
) -> None:
    rows: list[TileRow] = []
    bad: list[BadTile] = []
    turned, blurred, failed = 0, 0, None
    vectors = [np.empty((0, job.parts.dim), np.float32)]
    with job.parts.token_writer(part) as append:
        for first, last in _requests(job, part):
            decoded, tiles_BHWC = next(answers)
            failed = failed or decoded.failed
            if decoded.rows and failed is None:
                made = job.encode(tiles_BHWC[: len(decoded.rows)], decoded.resized)
                vectors.append(made.vectors)
                append(made.tokens)
                rows += decoded.rows
            bad += decoded.bad
            turned += decoded.turned
            blurred += decoded.blurred
            progress.update(last - first - len(decoded.bad), decoded.bad)
    job.parts.write(part, rows, np.concatenate(vectors), bad, turned, blurred, failed)


class _Progress:
    """Counts tiles and bad tiles of this rank; the first rank shows them, as a bar or as a line now and then."""

    def __init__(self, job: EmbedJob, parts: Sequence[Part], finished: Mapping[int, PartFacts], ranks: Ranks) -> None:
        self._job = job
        self.done = self._met = 0
        # Those of a run before this one count, too. Met by other ranks, they count in the end.
        self._bad = [tile for facts in finished.values() for tile in facts.bad]
        self._shows = ranks.rank == 0
        title = f"embed (rank 0 of {ranks.world})" if ranks.world > 1 else "embed"
        total = sum(part.last - part.first for part in parts)
        self.bar = ProgressBar(total=total, desc=title, unit="tile", disable=not self._shows)
        self.started = time.monotonic()
        if self._shows and finished:
            logger.info("%d of %d parts are finished; going on", len(finished), len(job.parts))

    def update(self, good: int, bad: Sequence[BadTile]) -> None:
        """Count a batch.

        Raises:
            InputError: there are too many bad tiles by now.
        """
        self.done += good + len(bad)
        for tile in bad:
            self._met += 1
            if self._met <= _WARNED_BAD:
                more = "; further ones are only counted" if self._met == _WARNED_BAD else ""
                logger.warning("tile %s left out: %s%s", tile.key, tile.reason, more)
        self._bad += bad
        self._job.check_bad(len(self._bad), self._bad)
        self.bar.update(good + len(bad))
