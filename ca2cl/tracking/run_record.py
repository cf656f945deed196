"""``run.json``: which MLflow run a folder belongs to.

A run is made by whoever first reaches its store: the job at its start, its mirror later, or ``ca2cl sync``.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from ca2cl.common.files import replacing
from ca2cl.common.records import Number, read_record
from ca2cl.common.redact import redact
from ca2cl.errors import InputError
from ca2cl.store.databases import database_of
from ca2cl.store.locate import RUN_RECORD, find_made_in
from ca2cl.store.notes import source_tags
from ca2cl.store.open import Store, StoreAway, fetch_run, open_store, store_errors
from ca2cl.tracking.environment import git_commit
from ca2cl.tracking.replay import Replayer

RUN_NAME = RUN_RECORD
KEY_TAG = "ca2cl.run_key"
_RUN_ID = re.compile(r"[\w-]{0,64}")  # it becomes a part of paths and addresses
_RUN_KEY = re.compile(r"[0-9a-f]{32}")  # it goes into a query
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunRecord:
    """Content of ``run.json``: the MLflow run of this folder. Never a secret."""

    __pydantic_config__ = {"allow_inf_nan": False, "extra": "forbid"}

    run_id: str
    """Empty until a store that was away at the start has given it one."""
    tracking_uri: str
    experiment: str
    created: Number
    """Unix seconds of the first start."""
    params: dict[str, str]
    """Flattened configuration of the first start; MLflow's parameters can never change."""
    name: str = ""
    """MLflow's run name."""
    tags: dict[str, str] = field(default_factory=dict)
    """Tags that the run is made with. One of them, ``KEY_TAG``, is its alone: it is found again by that where its
    making was cut off before the id was known."""
    beside: str = ""
    """The embedded store's database relative to this folder: the two may be moved or copied together."""

    def __post_init__(self) -> None:
        if not _RUN_ID.fullmatch(self.run_id):
            raise ValueError(f"run_id is {self.run_id!r:.100}, which no run has")
        key = self.tags.get(KEY_TAG, "")
        if not self.run_id and not _RUN_KEY.fullmatch(key):
            raise ValueError(f"tags[{KEY_TAG}] is {key!r:.100}, which no run has")


def read_run(run_dir: str | Path) -> RunRecord:
    """The ``run.json`` of a run folder.

    Raises:
        InputError: there is none, or it is damaged.
    """
    absent = "no run here; give a folder that a run wrote"
    remedy = "restore it or start a new run in another folder"
    return read_record(Path(run_dir) / RUN_NAME, RunRecord, remedy, absent=absent)


def write_run(folder: Path, record: RunRecord) -> None:
    """Write a folder's ``run.json``, whole or not at all."""
    with replacing(folder / RUN_NAME) as file:
        file.write(json.dumps(asdict(record), indent=2).encode())


def store_of(folder: Path, record: RunRecord, uri: str | None = None, root: str = "") -> Store:
    """The store that a run belongs to: the explicit URI, MLFLOW_TRACKING_URI, or the one the run was made in.

    Args:
        root: of the embedded store that is meant where that one is gone.

    Raises:
        InputError: it is gone, and no other is there.
    """
    chosen = uri or os.environ.get("MLFLOW_TRACKING_URI") or _made_in(folder, record, root)
    database = database_of(chosen)
    if database is not None and not database.exists():  # MLflow would make an empty one there
        raise InputError(
            f"{folder / RUN_NAME}: the run's tracking store {database} is not there (was it moved?); say where it is "
            "now, by --tracking.uri, --tracking.root or MLFLOW_TRACKING_URI"
        )
    return open_store(chosen, check=False)


def _made_in(folder: Path, record: RunRecord, root: str) -> str:
    found = find_made_in(folder, record.tracking_uri, record.beside, record.run_id, root)
    if found != record.tracking_uri:
        _log.warning("the run was made in %s; its store is taken to be %s", record.tracking_uri, redact(found))
    return found


def beside(folder: Path, store: Store) -> str:
    """The embedded store's database relative to a run's folder; empty for any other store."""
    database = database_of(store.uri) if store.root is not None else None
    return os.path.relpath(database, folder.resolve()) if database is not None else ""


def system_tags() -> dict[str, str]:
    """Who made a run, with what, at which commit."""
    tags, commit = source_tags(), git_commit()
    return {**tags, "mlflow.source.git.commit": commit.partition("+")[0]} if commit else tags


def create_mlflow_run(store: Store, experiment_id: str, name: str, tags: Mapping[str, str] | None = None) -> str:
    """Make an MLflow run and return its id.

    Args:
        store: an open one.
        experiment_id: of an experiment there.
        name: of the run.
        tags: of the run.

    Raises:
        InputError: the store cannot be reached.
    """
    with store_errors(store.uri):
        made = store.client.create_run(experiment_id, run_name=name, tags={**system_tags(), **(tags or {})})
    return str(made.info.run_id)


def replayer_of(folder: Path, record: RunRecord, store: Store) -> Replayer:
    """The replayer that sends a run's folder to a store. It makes the run first, where the store was away until now."""
    return Replayer(folder, store, record.run_id, partial(_find_or_make, folder, store))


def _find_or_make(folder: Path, store: Store) -> str:
    """The id of the folder's run, which is in the store then.

    Raises:
        InputError: the store is away (``StoreAway``) or refuses, or does not know the run.
    """
    record = read_run(folder)  # anew: another process may have made it
    if record.run_id:
        fetch_run(store, record.run_id)
        return record.run_id
    experiment = store.experiment_id(record.experiment)
    with store_errors(store.uri):
        if not (made := _made_with(store, experiment, record)):
            store.client.create_run(experiment, int(record.created * 1000), record.tags, record.name)
            # asked again: an answer that was lost, and the client's own second try, leave two runs
            made = _made_with(store, experiment, record)
        for extra in made[1:]:
            store.client.delete_run(extra)
    if not made:
        why = "it made a run and does not find it"
        raise StoreAway(f"tracking store {store.public_uri} cannot be used: {why}; start again later", why)
    write_run(folder, replace(record, run_id=made[0]))
    _log.info("MLflow run %s in %s", made[0], store.place)
    return made[0]


def _made_with(store: Store, experiment: str, record: RunRecord) -> list[str]:
    """Ids of the runs that were made for this folder, the oldest first."""
    wanted = f"tags.`{KEY_TAG}` = '{record.tags[KEY_TAG]}'"
    return [
        str(run.info.run_id)
        for run in store.client.search_runs([experiment], wanted, order_by=["attribute.start_time ASC"])
    ]
