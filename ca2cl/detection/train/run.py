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
from ca2cl.detection.engines.base import CocoSplit, Engine, TrainJob, has_masks, split_names
from ca2cl.detection.engines.detectron2_weights import RECIPE
from ca2cl.detection.engines.registry import find_engine
from ca2cl.detection.train.config import DetectConfig
from ca2cl.detection.train.overlap import find_shared
from ca2cl.detection.train.report import report
from ca2cl.detection.train.split_checks import check_splits
from ca2cl.detection.train.trial import FIRST, Tests, Trial, TrialSettings, run_trial, trial_grid
from ca2cl.errors import InputError
from ca2cl.models.resnet import require_resnet
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
    engine = _engine(config)
    config = replace(config, engine=engine.name)  # what auto means may change from one start to the next
    starts = _starts(config)
    with stop.joining():
        accelerator = build_accelerator()
    check_precision(config.precision, accelerator.device, "precision")
    out = Path(config.output_dir).expanduser()
    grid = trial_grid(out, starts, config.seeds)
    ranks = Ranks()
    root = ranks.from_first(lambda: _begin(config, grid, held))
    train = CocoSplit.of(root, "train")
    splits = _test_splits(root)
    classes = [category["name"] for category in read_coco(train.annotations)["categories"]]
    leaks = find_shared(root, splits) if accelerator.is_main_process else {}  # told before hours of training
    tests = Tests(splits, config.min_score, accelerator)
    for trial in ranks.from_first(grid.missing):
        found, folder = starts[trial.start], grid[trial].parent
        job = TrainJob(
            config.head, found, train, classes, config.schedule(trial.seed), folder / "checkpoints",
            str(accelerator.device), config.workers,
        )  # fmt: skip
        name = config.tracking.run_name or "detect"
        tracking = replace(config.tracking, run_name=f"{name}-{trial.name}")
        settings = TrialSettings(trial.start, trial.seed, found.uri, config, tracking)
        if not run_trial(trial, engine, job, tests, settings, folder, stop):
            return stop.exit_code
    if accelerator.is_main_process:
        report(config, starts[FIRST.start], grid, root, leaks)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


def _engine(config: DetectConfig) -> Engine:
    engine = find_engine(config.engine, says=find_place().rank == 0)
    if config.head not in engine.heads:
        other = f"; {RECIPE}" if engine.name == "torchvision" else ""
        raise InputError(f"head is {config.head!r}: the engine {engine.name} has {', '.join(engine.heads)}{other}")
    return engine


def _starts(config: DetectConfig) -> dict[str, ResolvedEncoder]:
    from ca2cl.registry.resolve import resolve_encoder

    where: dict[str, Any] = {"tracking_uri": config.tracking.uri, "root": config.tracking.root}
    first = resolve_encoder(config.encoder, **where)
    require_resnet(first.card.arch, "detect")
    others = {name: resolve_encoder(name, arch=first.card.arch, **where) for name in config.against}
    return {FIRST.start: first, **others}


def _begin(config: DetectConfig, grid: Grid[Trial], held: ExitStack) -> Path:
    """Claim the job's folder; where the data are, prepared and checked."""
    job = JobDir(Path(config.output_dir).expanduser(), RECORD)
    record = job_record({name: value for name, value in flatten(config).items() if not name.startswith(_FREE)})
    again = job.begin(record, held)
    if not again:
        job.write(record)
    try:
        root = _prepared(config, job.path)
        train, tests = CocoSplit.of(root, "train"), _test_splits(root)
        if grid.missing():
            check_splits(train, tests, masks=has_masks(config.head))
    except InputError:
        if not again:  # a refused start leaves no folder behind
            job.withdraw()
        raise
    return root


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


def _test_splits(root: Path) -> dict[str, CocoSplit]:
    splits = {name: CocoSplit.of(root, name) for name in split_names(root) if name != "train"}
    if not splits:
        raise InputError(f"{root}: there is no split but train, so nothing to score on; give one more")
    return splits
