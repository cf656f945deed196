"""``ca2cl detect``: train detectors from several encoders and seeds, and compare."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ca2cl.common.grid import Grid
from ca2cl.common.job_dir import JobDir, job_record
from ca2cl.config import flatten
from ca2cl.detection.coco.files import read_coco
from ca2cl.detection.coco.segmentations import mask_tools
from ca2cl.detection.engines.base import CocoSplit, TrainJob, split_names
from ca2cl.detection.engines.registry import find_engine
from ca2cl.detection.engines.settings import has_masks
from ca2cl.detection.train.config import DetectConfig
from ca2cl.detection.train.report import report
from ca2cl.detection.train.split_checks import check_splits, find_shared
from ca2cl.detection.train.trial import FIRST, Trial, TrialRun, trial_grid
from ca2cl.errors import InputError
from ca2cl.models.backbone import has_batch_norm
from ca2cl.runtime.accelerator import build_accelerator
from ca2cl.runtime.distributed import Ranks
from ca2cl.runtime.launched import find_place, under_deepspeed
from ca2cl.runtime.precision import check_precision
from ca2cl.runtime.signals import StopFlag

if TYPE_CHECKING:
    from ca2cl.registry.resolve import ResolvedEncoder

logger = logging.getLogger(__name__)
RECORD = "detect.json"
_FREE = ("tracking.", "output_dir", "workers")
"""Settings that may change from one start of a job to the next."""


def run(config: DetectConfig) -> int:
    """Train every detector that is not there yet, print the table, log it. Returns the exit code: 0, or 85 after a
    signal and a checkpoint.

    Raises:
        InputError: data, an encoder or a setting that does not fit; a folder that holds another job.
    """
    with ExitStack() as held:
        return _run(config, held)


def _run(config: DetectConfig, held: ExitStack) -> int:
    if under_deepspeed():
        raise InputError("detect does not run under DeepSpeed: a detector is small; use a DDP configuration")
    mask_tools()
    stop = StopFlag().install()
    engine = find_engine(config.engine, hint=find_place().rank == 0)
    engine.check_head(config.head)
    starts = _starts(config)
    first = starts[FIRST.start]
    # what auto and none mean may change from one start to the next
    config = replace(config.resolved(batch_norm=has_batch_norm(first.encoder)), engine=engine.name)
    engine.check_encoder(first, config.head, config.schedule(0))
    with stop.joining():
        accelerator = build_accelerator()
    check_precision(config.precision, accelerator.device, "precision")
    grid = trial_grid(Path(config.output_dir).expanduser(), starts, config.seeds)
    ranks = Ranks()
    splits = ranks.from_first(lambda: _begin(config, grid, held))
    train = splits["train"]
    tests = {name: split for name, split in splits.items() if name != "train"}
    classes = [category["name"] for category in read_coco(train.annotations)["categories"]]
    # printed before hours of training
    leaks = find_shared(train, tests, starts) if accelerator.is_main_process else {}
    for trial in ranks.from_first(grid.missing):
        job = TrainJob(
            config.head, starts[trial.start], train, classes, config.schedule(trial.seed),
            grid[trial].parent / "checkpoints", str(accelerator.device), config.workers,
        )  # fmt: skip
        if not TrialRun(trial, engine, job, tests, config, accelerator, stop).run():
            return stop.exit_code
    if accelerator.is_main_process:
        report(config, starts[FIRST.start], grid, splits, leaks)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


def _starts(config: DetectConfig) -> dict[str, ResolvedEncoder]:
    from ca2cl.registry.resolve import resolve_encoder

    where: dict[str, Any] = {"tracking_uri": config.tracking.uri, "root": config.tracking.root}
    first = resolve_encoder(config.encoder, **where)
    others = {name: resolve_encoder(name, arch=first.card.arch, **where) for name in config.against}
    return {FIRST.start: first, **others}


def _begin(config: DetectConfig, grid: Grid[Trial], held: ExitStack) -> dict[str, CocoSplit]:
    """Claim the job's folder; the splits by name, prepared and checked."""
    job = JobDir(Path(config.output_dir).expanduser(), RECORD)
    record = job_record({name: value for name, value in flatten(config).items() if not name.startswith(_FREE)})
    again = job.begin(record, held)
    if not again:
        job.write(record)
    try:
        root = _prepared(config, job.path)
        splits = {name: CocoSplit.of(root, name) for name in split_names(root)}
        if len(splits) < 2:
            raise InputError(f"{root}: there is no split but train, so nothing to score on; give one more")
        if grid.missing():
            check_splits(splits, masks=has_masks(config.head))
    except InputError:
        if not again:  # a refused start leaves no folder behind
            job.withdraw()
        raise
    return splits


def _prepared(config: DetectConfig, out: Path) -> Path:
    """The folder of COCO files: ``data`` itself, or what becomes of it."""
    from ca2cl.detection.prepare.config import PrepareConfig
    from ca2cl.detection.prepare.run import run as prepare

    source = Path(config.data).expanduser()
    if not source.is_dir():
        raise InputError(f"data is {config.data!r}: no folder there; give one that `ca2cl detect prepare` wrote")
    if (source / "train.json").is_file():
        return source
    if config.dataset == "coco":
        raise InputError(f"data is {config.data!r}: has no train.json; make it with `ca2cl detect prepare masks`")
    made = out / "data"
    if not (made / "train.json").is_file():
        prepare(PrepareConfig(dataset=config.dataset, source=str(source), out=str(made)))
    return made
