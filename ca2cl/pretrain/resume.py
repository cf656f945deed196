"""Which settings may change when a run is resumed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ca2cl.common.arch_names import canonical_arch
from ca2cl.common.job_dir import changed, listed
from ca2cl.common.records import parse_json
from ca2cl.config import flatten
from ca2cl.errors import InputError
from ca2cl.methods.registry import DEFAULT, find_method
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.pretrain.shares import norm_of
from ca2cl.tracking.journal import JOURNAL_NAME, read_journal
from ca2cl.tracking.run import NullTracker
from ca2cl.tracking.run_record import RUN_NAME, read_run
from ca2cl.training.checkpoint import Checkpointer, read_state
from ca2cl.training.loop import Progress

logger = logging.getLogger(__name__)
FREE = (
    # data are identified by their digest, not their location
    "data.shards", "data.cache_dir", "data.cache_gb", "data.fetch_timeout", "data.workers", "data.max_bad_rate",
    "run.output_dir", "run.resume", "run.fsdp", "model.checkpoint_activations",
    "run.checkpoint_every", "run.keep_last", "run.keep_every", "run.log_every", "run.figures_every", "run.max_skipped",
    "watch.shards", "watch.labelled", "watch.every", "watch.tiles", "watch.metric", "watch.stop", "watch.seed",
    "tracking.uri", "tracking.root", "tracking.experiment", "tracking.run_name", "tracking.register_as",
    "tracking.sinks",
)  # fmt: skip
"""Settings that do not affect the encoder's weights. All others must stay as at the run's first start."""
_SINCE = {
    "method.name": DEFAULT, "model.drop_path": "0.0", "optim.layer_decay": "None", "optim.decay_all": "True",
    "optim.freeze_layers": "0", "optim.freeze_steps": "0", "optim.ema": "None",
    "data.max_per_slide": "None", "objective.same_slide_weight": "1.0",
}  # fmt: skip
"""Settings that the first runs did not record, with what they then were."""
_LENGTH = ("run.steps", "run.epochs")
_OPEN_ENDED = ("constant", "cosine_restarts")
"""Schedules whose rates do not depend on the run's length."""


def may_change(name: str, config: PretrainConfig) -> bool:
    """Whether the setting may differ when the run is resumed."""
    if name == "run.micro_batch_size":  # then BatchNorm's statistics and the negatives are the same in any share
        return config.run.accumulation != "plain" and norm_of(config) != "sync"
    return name in FREE or name in _LENGTH


def is_finished(
    config: PretrainConfig, steps: int, steps_per_epoch: int, manifest_digest: str, origin: Mapping[str, str | None]
) -> bool:
    """Whether the run in ``run.output_dir`` is finished, in which case a line is logged.

    Args:
        steps: optimizer steps that are asked for.
        steps_per_epoch: of the data.
        manifest_digest: of the data.
        origin: digests of the weights that ``model.weights`` means and of the teacher, as checkpoints hold them:
            ``start_weights`` and ``teacher``.

    Raises:
        InputError: it is a run with other settings or data. The line names them, and how to go on from its weights.
    """
    folder = Path(config.run.output_dir)
    if config.run.resume == "never" or not (folder / RUN_NAME).exists():
        return False
    first = {**_SINCE, **read_run(folder).params}
    first["model.arch"] = canonical_arch(first.get("model.arch", config.model.arch))
    checkpointer = Checkpointer(folder / "checkpoints", 1)
    newest, saved = checkpointer.newest(), checkpointer.state()
    now = {name: str(value) for name, value in flatten(config).items()}
    differing = {name for name in now if name in first and now[name] != first[name] and not may_change(name, config)}
    if saved.get("start_weights") == origin["start_weights"]:
        differing.discard("model.weights")  # the same file by another path
    if saved.get("teacher") == origin["teacher"] and _same_options(config, first.get("method.options", "[]")):
        differing.discard("method.options")
    changes = changed(first, {name: now[name] for name in now if name in differing})
    if saved and saved.get("teacher") != origin["teacher"] and "method.name" not in differing:
        changes.append(f"the teacher, {saved.get('teacher')} -> {origin['teacher']}")
    trained_on = _data_of(folder)
    if trained_on not in ("", manifest_digest):
        changes.append(f"the tiles in data.shards, manifest {trained_on[:8]} -> {manifest_digest[:8]}")
    reached = int(newest.name.removeprefix("step-")) if newest is not None else 0
    done = reached > 0 and _status(folder) == "FINISHED"
    if changes:
        raise InputError(_refusal(config, changes, f"finished run of {reached} steps" if done else "run", newest))
    back = config.run.resume != "auto" and newest is not None and saved.get("resume") != config.run.resume
    if done and reached == steps and not back:
        logger.info("%s: finished (%d of %d steps), nothing to do", folder, reached, steps)
        return True
    begun_with = _total(first, steps_per_epoch)
    if begun_with not in (None, steps) and config.optim.schedule not in _OPEN_ENDED:
        logger.warning(
            "%s: %d steps instead of %d; optim.schedule %s goes to the new last step, and the %d steps done had the "
            "old rates", folder, steps, begun_with, config.optim.schedule, reached,
        )  # fmt: skip
    return False


def check_progress(progress: Progress, steps: int) -> None:
    """Refuse a length that the newest checkpoint is beyond.

    Raises:
        InputError: it is.
    """
    if progress.step > steps:
        raise InputError(
            f"run.steps is {steps}: the newest checkpoint is of step {progress.step}; ask for more, or use another "
            "run.output_dir"
        )


def name_origin(tracker: NullTracker, checkpoint: Path | None) -> None:
    """Tag the run with the checkpoint of another run that it was forked from."""
    state = read_state(checkpoint) if checkpoint is not None else {}
    if state.get("run_id") and state["run_id"] != tracker.run_id:
        tracker.set_tag("ca2cl.begun_from", f"{state['run_id']} step {state['step']}")


def _same_options(config: PretrainConfig, first: str) -> bool:
    """Whether ``method.options`` are those of the first start, but for the paths of what its digest identifies."""
    paths = find_method(config.method.name).paths

    def told(words: Sequence[str]) -> dict[str, Any]:
        pairs = (word.partition("=")[::2] for word in words)
        return {name: bool(value) if name in paths else value for name, value in pairs}

    return told(config.method.options) == told(parse_json(first))


def _refusal(config: PretrainConfig, changes: list[str], what: str, newest: Path | None) -> str:
    fork = f", where --run.resume {newest} goes on from its weights" if newest is not None else ""
    return (
        f"run.output_dir is {config.run.output_dir!r}: it holds a {what} with other settings ({listed(changes)}); "
        f"use those, or another run.output_dir{fork}"
    )


def _total(params: Mapping[str, str], steps_per_epoch: int) -> int | None:
    """Optimizer steps of the first start's settings."""
    steps, epochs = (params.get(name, "") for name in _LENGTH)
    if steps.isdecimal():
        return int(steps)
    return int(epochs) * steps_per_epoch if epochs.isdecimal() else None


def _data_of(folder: Path) -> str:
    """Digest of the data of the run's first start; empty if not recorded."""
    try:
        return str(parse_json((folder / "manifest.json").read_text(encoding="utf-8"))["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _status(folder: Path) -> str:
    """The run's last status in the journal; empty if there is none."""
    path, status = folder / JOURNAL_NAME, ""
    if path.exists():
        for record, _ in read_journal(path):
            if record.get("event") == "status":
                status = str(record.get("status", ""))
    return status
