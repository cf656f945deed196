"""``ca2cl probe``: what the frozen features of an encoder are worth, beside the floors, at several label budgets."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ca2cl import __version__
from ca2cl.config import TrackingConfig, flatten
from ca2cl.data.index import ShardIndex
from ca2cl.data.splits import check_budget
from ca2cl.errors import InputError
from ca2cl.evaluation.device import find_device
from ca2cl.evaluation.features import Extractor, frozen
from ca2cl.evaluation.floors import colour_histogram
from ca2cl.evaluation.probe_data import ProbeSet, check_every_class, find_leak, open_pair, read_set
from ca2cl.evaluation.probe_report import draw_confusion, row_as_dict, table, tracked_metrics, write_json
from ca2cl.evaluation.scoring import LINEAR, Row, Subsets, draw_subsets, score

if TYPE_CHECKING:
    from ca2cl.tracking.resolver import ResolvedEncoder

POSITIONAL: tuple[str, ...] = ()
SCHEMA_VERSION = 1
ENCODER, COLOURS, RANDOM = "encoder", "colour histogram", "random encoder"


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """A probe of frozen features."""

    encoder: str
    """Run id, runs:/ID, models:/NAME@ALIAS, run folder, .safetensors file, torchvision:IMAGENET1K_V1 or random."""
    train: str
    """Shards with the labelled tiles."""
    test: str
    """Shards with the test tiles; their classes must be those of train. Never used to choose anything."""
    labels: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Label budgets: a fraction of each class's tiles up to 1, or a whole number of tiles a class above 1."""
    seeds: int = 5
    """Draws of the labelled tiles for every budget: seeds 0, 1, and so on."""
    knn: int = 20
    """Neighbours that vote."""
    strength: float | Literal["auto"] = 1.0
    """C of the logistic regression, scikit-learn's inverse L2 strength, on centred features of unit length; or auto:
    chosen on held-out labelled tiles, which is sound only where those come from other slides than the rest."""
    batch_size: int = 256
    """Tiles that go through the encoder at once."""
    workers: int = 2
    """Decoding processes; 0 decodes in this one."""
    image_size: int | None = None
    """Side in pixels that tiles are resized to; none takes the encoder's own."""
    cache_dir: str | None = None
    """Local folder in which remote shards are kept. Needed for remote shards only."""
    output: str | None = None
    """JSON file with every number; none takes probe-<run>-<test data>.json under tracking.root."""
    floors: bool = True
    """Also probe colour histograms and a random encoder of the same architecture."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the encoder is found and the result is logged."""

    def __post_init__(self) -> None:
        if not self.labels:
            raise InputError("labels is empty: give at least one budget, such as 0.1")
        for budget in self.labels:
            check_budget(budget)
        for name, least in (("seeds", 1), ("knn", 1), ("batch_size", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)!r}: use {least} or more")
        if self.strength != "auto" and self.strength <= 0:
            raise InputError(f"strength is {self.strength!r}: use a positive number or auto")
        if self.image_size is not None and self.image_size < 32:
            raise InputError(f"image_size is {self.image_size!r}: use at least 32 pixels")


def run(config: ProbeConfig) -> int:
    """Probe an encoder: print the table, write the JSON, log the MLflow run. Returns the exit code.

    Raises:
        InputError: data sets that do not fit together, an unknown encoder, an unwritable output.
    """
    from ca2cl.tracking.resolver import resolve_encoder

    indexes = open_pair(config.train, config.test, config.cache_dir)
    device = find_device(config.device)
    found = resolve_encoder(config.encoder, tracking_uri=config.tracking.uri, root=config.tracking.root)
    output = _prepare_output(config, found, indexes)
    extractors = build_extractors(found, config, device)
    train, test = (
        read_set(
            f"features of {root}",
            root,
            index,
            extractors,
            cache_dir=config.cache_dir,
            batch_size=config.batch_size,
            workers=config.workers,
            device=device,
        )
        for root, index in zip((config.train, config.test), indexes, strict=True)
    )
    check_every_class(train.root, train.tiles.labels_N, train.index.classes)
    leak = find_leak(train.side(), test.side())
    subsets = draw_subsets(train.tiles.labels_N, config.labels, config.seeds)
    rows = score(train.tiles, test.tiles, subsets, k=config.knn, strength=config.strength)
    sys.stdout.write(table(rows))
    files = _write(output, rows, _content(config, found, train, test, subsets, rows, leak))
    sys.stdout.write(f"\nmean ± sd over {config.seeds} seeds; written to {files[0]} and {files[1]}\n")
    sys.stdout.flush()
    # Last, so that a store that is away costs no result.
    run_id = _log(config, found, train, test, rows, files)
    sys.stdout.write(f"logged as MLflow run {run_id}\n")
    return 0


def build_extractors(found: ResolvedEncoder, config: ProbeConfig, device: torch.device) -> dict[str, Extractor]:
    """The encoder and, unless they are switched off, its floors; another floor is one more entry here."""
    card = found.card
    size = config.image_size or card.input_size
    extractors = {ENCODER: frozen(found.encoder.to(device), size, card.mean, card.std)}
    if config.floors:
        from ca2cl.tracking.resolver import resolve_encoder

        untrained = resolve_encoder("random", arch=card.arch).encoder
        extractors[COLOURS] = colour_histogram
        extractors[RANDOM] = frozen(untrained.to(device), size, card.mean, card.std)
    return extractors


def _prepare_output(config: ProbeConfig, found: ResolvedEncoder, indexes: Sequence[ShardIndex]) -> Path:
    """The JSON's path, in a folder that can be written: found out before the work and not after it.

    The default name is one that another encoder or other data does not overwrite.
    """
    if config.output:
        path = Path(config.output)
    else:
        name = re.sub(r"[^\w.@-]+", "-", found.source_run_id or found.uri).strip("-")[-64:]
        data = hashlib.sha256("".join(index.manifest.digest for index in indexes).encode()).hexdigest()[:8]
        path = Path(config.tracking.root) / f"probe-{name}-{data}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output is {str(path)!r}: {error.strerror}; give a file in a folder you can write") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"output is {str(path)!r}: cannot be written; give a file in a folder you can write")
    return path


def _content(
    config: ProbeConfig,
    found: ResolvedEncoder,
    train: ProbeSet,
    test: ProbeSet,
    subsets: Subsets,
    rows: Sequence[Row],
    leak: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that the JSON holds. Labelled tiles are sample numbers in index order; all of them read ``all``."""
    samples_N = train.tiles.samples_N
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "probe",
        "ca2cl": __version__,
        "encoder": {
            "uri": found.uri,
            "source_run_id": found.source_run_id,
            "card": dataclasses.asdict(found.card),
            "image_size": config.image_size or found.card.input_size,
        },
        "classes": train.index.classes,
        "data": {"train": train.describe(), "test": test.describe()},
        "leak": dict(leak),
        "config": flatten(config),
        "results": [row_as_dict(row) for row in rows],
        "labelled_tiles": {
            f"{budget:g}": ["all" if len(s) == len(samples_N) else samples_N[s].tolist() for s in draws]
            for budget, draws in subsets.items()
        },
    }


def _write(output: Path, rows: Sequence[Row], content: Mapping[str, Any]) -> list[Path]:
    """The JSON, and the confusion matrix of the linear probe at the largest budget."""
    write_json(output, content)
    figure = output.with_name(f"{output.stem}-confusion.png")
    shown = [row for row in rows if row.features == ENCODER and row.classifier == LINEAR][-1]
    title = f"{shown.features}, {shown.classifier}, {shown.labelled} labelled tiles: % of each label"
    draw_confusion(figure, shown.confusion, content["classes"], title)
    return [output, figure]


def _log(
    config: ProbeConfig,
    found: ResolvedEncoder,
    train: ProbeSet,
    test: ProbeSet,
    rows: Sequence[Row],
    files: Sequence[Path],
) -> str:
    from ca2cl.tracking.evaluation_run import log_evaluation

    return log_evaluation(
        source_run_id=found.source_run_id,
        name="probe",
        params={**flatten(config), "encoder_uri": found.uri},
        metrics=tracked_metrics(rows),
        artifacts=files,
        tags={
            "ca2cl.kind": "probe",
            "ca2cl.train_manifest_digest": train.index.manifest.digest,
            "ca2cl.test_manifest_digest": test.index.manifest.digest,
        },
        uri=config.tracking.uri,
        root=config.tracking.root,
        experiment=config.tracking.experiment,
    )
