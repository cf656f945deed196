"""Collect what a store and a run folder hold about a run.

The folder's journal is the truth and the store mirrors it, so the folder is read where it can be found; a run that was
made on another machine is read from the store alone, and a folder whose store cannot be reached is read alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ca2cl.common.records import parse_json
from ca2cl.config import TrackingConfig
from ca2cl.errors import InputError
from ca2cl.models.encoder_io import ENCODER_PATH, WEIGHTS_NAME
from ca2cl.registry.downstream import Downstream, runs_for
from ca2cl.registry.evaluation_run import SOURCE_RUN_TAG
from ca2cl.registry.versions import EncoderVersion, find_version, needed_store
from ca2cl.store.names import WORD, is_stored
from ca2cl.store.open import Store, fetch_run, store_errors
from ca2cl.store.run_artifacts import artifact_texts
from ca2cl.tracking.journal import JOURNAL_NAME, WATCH_PREFIX, is_training, read_journal, watch_lines
from ca2cl.tracking.run_record import RUN_NAME, read_run, store_of

FILES = ("config.yaml", "environment.json", "manifest.json")
_SYSTEM = "system/"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunMaterial:
    """Facts about a run; those that could not be read are empty."""

    run_id: str
    name: str
    status: str
    """RUNNING, FINISHED, FAILED or KILLED; a run whose machine died still says RUNNING."""
    started: int | None = None
    """Milliseconds since 1970."""
    ended: int | None = None
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    """Training lines, ascending in step."""
    watched: list[dict[str, Any]] = field(default_factory=list)
    """Watch lines, with their step as ``step``."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Text of those of ``FILES`` that there are."""
    folder: Path | None = None
    """The run's folder, where it is on this machine."""
    store: Store | None = None
    fault: str = ""
    """Reason why there is no store."""
    entry: EncoderVersion | None = None

    @property
    def encoder(self) -> str:
        """Name of the run's encoder for the resolver: the store's where there is one."""
        inside = self.folder is not None and (self.folder / ENCODER_PATH / WEIGHTS_NAME).exists()
        if self.entry is not None and (self.entry.version or not inside):
            return self.entry.uri
        return str(self.folder) if self.folder is not None else f"runs:/{self.run_id}"

    def document(self, name: str) -> dict[str, Any]:
        """One of the JSON files, empty where it is missing or damaged."""
        return _document(self.files, name)

    def bases(self) -> list[Path]:
        """Folders that the run's relative paths may be relative to: this one, and the one that it was started in."""
        return _bases(self.params, self.folder, self.store)

    def downstream(self) -> list[Downstream]:
        """Finished runs that used its encoder, newest first.

        Raises:
            InputError: the store cannot be reached.
        """
        return runs_for(self.store, self.entry) if self.store is not None and self.entry is not None else []


def read_material(source: str, tracking: TrackingConfig) -> RunMaterial:
    """Find a run and read what there is of it.

    Args:
        source: a run's folder, or what ``find_version`` takes.

    Raises:
        InputError: no such run, a run that evaluated an encoder and made none, or a store that cannot be reached (of a
            folder only where it was named by ``tracking.uri``).
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _from_folder(folder, tracking)
    if is_stored(source) or WORD.fullmatch(source):
        store = needed_store(tracking)
        return _from_store(store, find_version(store, source))
    raise InputError(
        f"run {source!r}: names no run; give a run id or its first digits, a version's number, an alias, "
        "models:/NAME/VERSION, models:/NAME@ALIAS or a run's folder (`ca2cl encoders import` makes a run of an encoder "
        "that has none)"
    )


def _from_folder(folder: Path, tracking: TrackingConfig) -> RunMaterial:
    record = read_run(folder)
    try:
        if not record.run_id:
            raise InputError(f"{folder}: MLflow was away and has not seen this run yet; run `ca2cl sync {folder}`")
        store = store_of(folder, record, tracking.uri, tracking.root)
        return _from_store(store, find_version(store, record.run_id), folder)
    except InputError as error:
        if tracking.uri:
            raise
        fault = str(error)
    lines, watched, status = _journal(folder)
    files = dict(_texts(folder))
    tags = {"ca2cl.manifest_digest": str(_document(files, "manifest.json").get("digest", ""))}
    return RunMaterial(
        run_id=record.run_id, name=folder.resolve().name, status=status or "RUNNING",
        started=int(record.created * 1000), params=record.params, tags=tags, lines=lines, watched=watched,
        files=files, folder=folder, fault=fault,
    )  # fmt: skip


def _from_store(store: Store, entry: EncoderVersion, folder: Path | None = None) -> RunMaterial:
    if not entry.run_id:
        raise InputError(f"{entry.uri}: was registered without a run; give a run id")
    run = fetch_run(store, entry.run_id)
    tags, params = dict(run.data.tags), dict(run.data.params)
    if SOURCE_RUN_TAG in tags:
        raise InputError(
            f"run {entry.run_id!r}: is a {tags.get('ca2cl.kind', 'downstream run')} of an encoder; give the run that "
            f"made it, {tags[SOURCE_RUN_TAG]}"
        )
    folder = folder or _folder_of(entry.run_id, params, store)
    lines, watched, status = _journal(folder) if folder else ([], [], "")
    if not lines:
        lines, watched = _mirrored(store, run)
    return RunMaterial(
        run_id=entry.run_id, name=run.info.run_name or entry.run_id, status=status or run.info.status,
        started=run.info.start_time, ended=run.info.end_time, params=params, tags=tags,
        lines=lines, watched=watched, files=_files(store, entry.run_id, folder), folder=folder, store=store,
        entry=entry,
    )  # fmt: skip


def _folder_of(run_id: str, params: Mapping[str, str], store: Store) -> Path | None:
    """The run's folder, if it is here and is that run's."""
    output_dir = params.get("run.output_dir")
    for base in _bases(params, None, store) if output_dir else []:
        folder = base / str(output_dir)
        try:
            if (folder / RUN_NAME).exists() and read_run(folder).run_id == run_id:
                return folder
        except InputError as error:
            _log.warning("%s", error)
    return None


Lines = list[dict[str, Any]]


def _journal(folder: Path) -> tuple[Lines, Lines, str]:
    """Training lines, watch lines, and the last status; nothing where there is no journal."""
    path, lines, status = folder / JOURNAL_NAME, [], ""
    if not path.exists():
        return [], [], ""
    for record, _ in read_journal(path):
        if is_training(record):
            lines.append(record)
        elif record.get("event") == "status":
            status = str(record.get("status", ""))
    return lines, list(watch_lines(path)), status


def _mirrored(store: Store, run: Any) -> tuple[Lines, Lines]:
    """Training and watch lines as far as MLflow has them as metrics."""
    steps: tuple[dict[int, dict[str, Any]], dict[int, dict[str, Any]]] = ({}, {})
    with store_errors(store.uri):
        for name in sorted(run.data.metrics):
            if name.startswith(_SYSTEM):
                continue
            for point in store.client.get_metric_history(run.info.run_id, name):
                line = steps[name.startswith(WATCH_PREFIX)].setdefault(point.step, {"step": point.step})
                line[name] = point.value if math.isfinite(point.value) else None
    trained, watched = ([found[step] for step in sorted(found)] for found in steps)
    return trained, watched


def _texts(folder: Path) -> Iterator[tuple[str, str]]:
    for name in FILES:
        path = folder / name
        if path.exists():
            yield name, path.read_text(encoding="utf-8", errors="replace")


def _document(files: Mapping[str, str], name: str) -> dict[str, Any]:
    try:
        held = parse_json(files.get(name, "{}"))
    except ValueError:
        return {}
    return held if isinstance(held, dict) else {}


def _bases(params: Mapping[str, str], folder: Path | None, store: Store | None) -> list[Path]:
    found = [Path.cwd()]
    root = store.root if store is not None else None
    for here, setting in ((folder, "run.output_dir"), (root, "tracking.root")):
        relative = Path(params.get(setting) or "/")
        if here is None or relative.is_absolute():
            continue
        depth = len(relative.parts)
        if here.resolve().parts[-depth:] == relative.parts:
            found.append(here.resolve().parents[depth - 1])
    return found


def _files(store: Store, run_id: str, folder: Path | None) -> dict[str, str]:
    found = dict(_texts(folder)) if folder else {}
    wanted = [name for name in FILES if name not in found]
    return {**artifact_texts(store, run_id, wanted), **found}
