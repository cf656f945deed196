"""Checkpoints: atomic folders of safetensors and JSON, for any world size.

A folder appears by one rename after its files have been synced to disk, and only then does ``latest`` name it, so a run
killed at any instruction finds a whole one. Later damage (a flipped bit, a truncated copy) shows in the digests of
``state.json``: ``latest`` then falls back to the previous checkpoint.

They are consolidated, the same files for every engine and number of processes, but never in memory: whole tensors are
gathered, written and read one at a time.

Collective by signature: every rank calls ``save`` (saving under ``is_main_process`` deadlocks:
latent-consistency-model#110). No pickle is written or read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ca2cl.common.files import file_digest, fsync, link
from ca2cl.common.records import Count, DamagedRecord, Number, parse_json, parse_record
from ca2cl.errors import InputError
from ca2cl.runtime.tensor_files import Whole, reading_tensors, write_tensors
from ca2cl.training.engine import AccelerateEngine

logger = logging.getLogger(__name__)
SCHEMA_VERSION = 1
_NAME = re.compile(r"step-\d+")
_MODEL, _OPTIMIZER, _STATE, _LATEST = "model.safetensors", "optimizer.safetensors", "state.json", "latest"
_EMA = "ema.safetensors"
"""The moving average of the weights, where the run keeps one."""
BEST_NAME = "best.safetensors"
"""Weights of the best encoder so far, where the run keeps one."""


class Checkpointer:
    """Writes and finds the checkpoints of one run.

    Args:
        folder: ``checkpoints/`` of the run.
        keep_last: how many of the newest stay.
        keep_every: those of every so many steps stay for good; None: none.
        best: weights of the best encoder so far. Each checkpoint keeps those of its time, if there are any.
    """

    def __init__(
        self, folder: Path, keep_last: int, keep_every: int | None = None, best: Path | None = None
    ) -> None:  # fmt: skip
        self.folder, self.keep_last, self.keep_every, self.best = folder, keep_last, keep_every, best
        self._damaged: set[Path] = set()

    def latest(self) -> Path | None:
        """The newest intact checkpoint, None if there is no checkpoint yet. Damaged ones are skipped with a warning.

        Raises:
            InputError: there are some, and all are damaged; or the newest is of a newer schema.
        """
        candidates = self._candidates()
        for path in candidates:
            try:
                verify(path)
                return path
            except DamagedCheckpoint as error:
                logger.warning("%s; going back to the one before", error)
                self._damaged.add(path)
        if candidates:
            raise InputError(
                f"{self.folder}: every checkpoint is damaged; bring one back, or remove the folder to begin again"
            )
        return None

    def to_resume(self, resume: str) -> Path | None:
        """The checkpoint that ``run.resume`` means: ``auto``, ``never``, or the path of one to begin from.

        Raises:
            InputError: for ``auto`` as ``latest``; otherwise there is none at that path, or a damaged one.
        """
        if resume == "never":
            return None
        if resume == "auto":
            return self.latest()
        with suppress(InputError):  # of a folder whose own ones are damaged
            newest = self.latest()
            if newest is not None and read_state(newest).get("resume") == resume:
                return newest  # started again by the same command, as schedulers do: not from that path once more
        verify(Path(resume))
        return Path(resume)

    def newest(self) -> Path | None:
        """The checkpoint written last, without verifying it; None if there is none."""
        return next(iter(self._candidates()), None)

    def state(self) -> dict[str, Any]:
        """State of the newest checkpoint whose state can be read; empty if there is none.

        Raises:
            InputError: of a newer schema.
        """
        for path in self._candidates():
            with suppress(DamagedCheckpoint):  # ``latest`` warns of it
                return read_state(path)
        return {}

    def _candidates(self) -> list[Path]:
        """What ``latest`` names, then those of earlier steps, backwards. A run that was killed before its first
        checkpoint had its name in ``latest`` has that one."""
        there = sorted(self.folder.glob("step-*"), reverse=True)
        pointer = self.folder / _LATEST
        if not pointer.exists():
            return there
        name = pointer.read_text(encoding="utf-8", errors="replace").strip()
        if not _NAME.fullmatch(name):
            raise InputError(
                f"{pointer}: {name[:80]!r} is no checkpoint's name; remove the file to go on from the newest"
            )
        return [self.folder / name, *(path for path in there if path.name < name)]

    def save(self, step: int, engine: AccelerateEngine, state: dict[str, Any]) -> None:
        """Write the checkpoint of ``step`` optimizer steps done. Every rank must call it."""
        moments, numbers = _tensors_and_numbers(engine.optimizer_state())
        files = {_MODEL: engine.weights(), _OPTIMIZER: moments}
        if engine.ema is not None:
            files[_EMA] = engine.average_state()
        if engine.accelerator.is_main_process:
            try:
                self._write(step, engine, files, {"optimizer": numbers, **state})
            except (OSError, SafetensorError) as error:
                shutil.rmtree(self._temporary(step), ignore_errors=True)
                reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
                raise InputError(
                    f"{self.folder}: cannot write the checkpoint of step {step} ({reason}); free some room and start "
                    "again: the run goes on from the checkpoint before"
                ) from None
        else:
            for tensors in files.values():
                write_tensors(None, tensors)
        engine.accelerator.wait_for_everyone()

    def _write(
        self, step: int, engine: AccelerateEngine, files: dict[str, dict[str, Whole]], state: dict[str, Any]
    ) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"step-{step:09d}"
        temporary = self._temporary(step)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        digests = {}
        for name, tensors in files.items():
            with (temporary / name).open("wb") as stream:
                digests[name] = write_tensors(stream, tensors)
        if self.best is not None and self.best.exists():
            link(self.best, temporary / BEST_NAME)
            digests[BEST_NAME] = file_digest(self.best)
        content = {"schema_version": SCHEMA_VERSION, "step": step, **state}
        content["optimizer_name"] = engine.optimizer_name
        content["scaler"] = engine.scaler.state_dict() if engine.scaler is not None else None
        content["sha256"] = digests
        content["sha256"][_STATE] = _state_digest(content)
        (temporary / _STATE).write_text(json.dumps(content, indent=1), encoding="utf-8")
        for file in temporary.iterdir():
            fsync(file)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        fsync(self.folder)
        self._damaged.discard(target)
        self._point_at(target)
        self._prune(target)

    def _temporary(self, step: int) -> Path:
        return self.folder / f".step-{step:09d}.tmp"

    def _point_at(self, target: Path) -> None:
        temporary = self.folder / f".{_LATEST}.tmp"
        temporary.write_text(target.name, encoding="utf-8")
        fsync(temporary)
        temporary.replace(self.folder / _LATEST)
        fsync(self.folder)

    def _prune(self, newest: Path) -> None:
        """Delete old checkpoints, always keeping the newest intact ones.

        Later steps, left behind by a run that fell back, and damaged checkpoints do not count towards ``keep_last``:
        they would displace the intact one that the run resumed from.
        """
        there = sorted(self.folder.glob("step-*"))
        before = [path for path in there if path <= newest and path not in self._damaged]
        kept = set(before[-self.keep_last :])
        if self.keep_every is not None:
            kept |= {path for path in before if int(path.name.removeprefix("step-")) % self.keep_every == 0}
        for old in set(there) - kept:
            shutil.rmtree(old, ignore_errors=True)


@dataclass
class _State:
    """What is checked of ``state.json``; the job's own fields are handed on as they are."""

    step: Count
    optimizer: dict[str, dict[str, Any]]
    schema_version: Count = 0
    progress: dict[str, Count] = field(default_factory=dict)
    best: dict[str, Number | None] = field(default_factory=dict)
    scaler: dict[str, Any] | None = None
    sha256: dict[str, Any] = field(default_factory=dict)


class DamagedCheckpoint(InputError):
    """A checkpoint that is not as it was written."""


def verify(path: Path) -> None:
    """Compare a checkpoint's files with the digests that it holds; those of older versions hold none.

    Raises:
        DamagedCheckpoint: a file is missing or another, or the state cannot be read.
        InputError: of a newer schema.
    """
    state = read_state(path)
    wanted = state.get("sha256", {})
    try:
        files = [name for name in (_MODEL, _OPTIMIZER, _EMA, BEST_NAME) if name in wanted]
        changed = next((name for name in files if wanted[name] != file_digest(path / name)), None)
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: damaged ({error})") from None
    misplaced = path.name.startswith("step-") and path.name != f"step-{state['step']:09d}"
    if changed is None and (misplaced or (wanted and wanted.get(_STATE) != _state_digest(state))):
        changed = _STATE
    if changed is not None:
        raise DamagedCheckpoint(f"{path}: damaged, {changed} is not what was written")


def _state_digest(state: dict[str, Any]) -> str:
    files = {name: digest for name, digest in state["sha256"].items() if name != _STATE}
    return hashlib.sha256(json.dumps({**state, "sha256": files}, sort_keys=True).encode()).hexdigest()


def read_state(path: Path) -> dict[str, Any]:
    """The JSON part of the checkpoint at ``path``.

    Raises:
        InputError: missing, damaged, or of a newer schema.
    """
    try:
        text = (path / _STATE).read_bytes()
        parse_record(text, _State, path, "give the path of another step-* folder", newest=SCHEMA_VERSION)
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: not a checkpoint ({error}); give the path of a step-* folder") from None
    except DamagedRecord as error:
        raise DamagedCheckpoint(str(error)) from None
    return dict(parse_json(text))


def restore(path: Path, engine: AccelerateEngine) -> None:
    """Load weights, optimizer state and loss scale of the checkpoint at ``path`` into ``engine``. Every rank calls it.

    Raises:
        InputError: damaged, or of another architecture.
    """
    state = read_state(path)
    saved, ours = state.get("optimizer_name"), engine.optimizer_name
    if saved not in (None, ours):  # the oldest checkpoints do not record it
        raise InputError(f"{path}: holds the state of {saved}, not of {ours}; set optim.name to that")
    entries: dict[str, dict[str, Any]] = {name: dict(numbers) for name, numbers in state["optimizer"].items()}
    try:
        with reading_tensors(path / _MODEL) as weights:
            engine.load_weights(weights)
        with reading_tensors(path / _OPTIMIZER) as moments:
            for key, value in moments.items():
                moment, _, name = key.partition("/")
                entries.setdefault(name, {})[moment] = value
            engine.load_optimizer_state(entries)
        if engine.ema is not None:
            _restore_average(path, engine)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path}: does not fit this network ({reason}); use the configuration it was made with"
        ) from None
    if engine.scaler is not None and state["scaler"]:
        engine.scaler.load_state_dict(state["scaler"])


def _restore_average(path: Path, engine: AccelerateEngine) -> None:
    """Load the average of the checkpoint at ``path``, or begin one with its weights, with a warning."""
    if (path / _EMA).exists():
        with reading_tensors(path / _EMA) as parts:
            engine.load_average(parts)
        return
    logger.warning("%s: holds no moving average of the weights; it begins with the weights of this step", path)
    engine.load_average(None)


def _tensors_and_numbers(state: dict[str, dict[str, Any]]) -> tuple[dict[str, Whole], dict[str, dict[str, Any]]]:
    """Optimizer state for safetensors, as ``moment/parameter``, and for JSON."""
    tensors: dict[str, Whole] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for name, entry in state.items():
        for key, value in entry.items():
            if isinstance(value, Whole):
                tensors[f"{key}/{name}"] = value
            else:
                numbers.setdefault(name, {})[key] = value
    return tensors, numbers
