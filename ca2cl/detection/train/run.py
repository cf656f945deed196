"""``ca2cl detect``: detectors trained from an encoder and from others beside it, several times each, and scored."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ca2cl.common.files import writing
from ca2cl.common.job_dir import JobFolder, hold_job
from ca2cl.config import flatten
from ca2cl.detection.coco.files import read_coco
from ca2cl.detection.coco.segmentations import mask_tools
from ca2cl.detection.engines.base import CocoSplit, Engine, Job, has_masks, split_names
from ca2cl.detection.engines.detectron2_weights import RECIPE
from ca2cl.detection.engines.registry import find_engine
from ca2cl.detection.train.config import DetectConfig
from ca2cl.detection.train.overlap import find_shared
from ca2cl.detection.train.report import report
from ca2cl.detection.train.split_checks import check_splits
from ca2cl.detection.train.trial import CELLS, FIRST, RESULT, Cell, CellSettings, Tests, run_cell
from ca2cl.errors import InputError
from ca2cl.models.resnet import require_resnet
from ca2cl.runtime.accelerator import build_accelerator
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
    cells = [Cell(*cell) for cell in itertools.product(starts, range(config.seeds))]
    problem, root = _from_first(_begin(config, out, cells) if accelerator.is_main_process else None)
    problem = problem or _from_first(hold_job(out, held) if accelerator.is_main_process else "")
    if problem:
        raise InputError(problem)
    train = CocoSplit.of(root, "train")
    splits = _test_splits(root)
    classes = [category["name"] for category in read_coco(train.annotations)["categories"]]
    leaks = find_shared(root, splits) if accelerator.is_main_process else {}  # told before hours of training
    tests = Tests(splits, config.min_score, accelerator)
    for cell in cells:
        folder = out / CELLS / cell.folder
        if _from_first((folder / RESULT).exists()):
            continue
        found = starts[cell.start]
        job = Job(
            config.head, found, train, classes, config.schedule(cell.seed), folder / "checkpoints",
            str(accelerator.device), config.workers,
        )  # fmt: skip
        name = config.tracking.run_name or "detect"
        tracking = replace(config.tracking, run_name=f"{name}-{cell.folder}")
        settings = CellSettings(cell.start, cell.seed, found.uri, config, tracking)
        if not run_cell(cell, engine, job, tests, settings, folder, stop):
            return stop.exit_code
    if accelerator.is_main_process:
        report(config, starts[FIRST.start], out, cells, root, leaks)
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


def _from_first(value: Any) -> Any:
    """Rank 0's value on every rank."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def _begin(config: DetectConfig, out: Path, cells: Sequence[Cell]) -> tuple[str, Path]:
    """Claim the folder and find the data, prepared and checked; what is wrong, or nothing, and where the data are.
    Rank 0's: its error must reach the others."""
    kept = {name: value for name, value in flatten(config).items() if not name.startswith(_FREE)}
    try:
        return "", _claimed(config, out, kept, cells)
    except InputError as error:
        return str(error), out


def _claimed(config: DetectConfig, out: Path, kept: Mapping[str, Any], cells: Sequence[Cell]) -> Path:
    folder = JobFolder(out, RECORD)
    again = folder.check(kept)
    with writing(out, "give a folder you can write"):
        out.mkdir(parents=True, exist_ok=True)
    folder.claim(kept)
    try:
        root = _prepared(config, out)
        train, tests = CocoSplit.of(root, "train"), _test_splits(root)
        if not all((out / "cells" / cell.folder / RESULT).exists() for cell in cells):
            check_splits(train, tests, masks=has_masks(config.head))
    except InputError:
        if not again:  # a refused start leaves no folder behind
            (out / RECORD).unlink()
            with suppress(OSError):
                out.rmdir()
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
