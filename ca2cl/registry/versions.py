"""Registered model versions, and how users name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ca2cl.common.tables import short
from ca2cl.config import TrackingConfig
from ca2cl.errors import InputError, nearest
from ca2cl.registry.register import DIGEST_TAG
from ca2cl.store.names import MODEL, full_run_id, is_stored
from ca2cl.store.open import Store, all_pages, fetch_run, open_store, resolve_uri, store_errors

ENCODER_NAME = "ca2cl-encoder"
ORIGIN_RUN_TAG = "ca2cl.origin_run_id"
LATEST = "latest"
ELSEWHERE = (
    "give a run's folder, or name the store: --tracking.root FOLDER or --tracking.uri URI, in Python root=FOLDER or "
    "tracking_uri=URI"
)
"""Remedy where a store has no encoder."""
_PAGE = 200


@dataclass(frozen=True)
class EncoderVersion:
    """A version of a registered model, or a run whose encoder is no version (``name`` and ``version`` are empty)."""

    name: str
    version: str
    run_id: str
    """Run that it was registered from."""
    aliases: tuple[str, ...] = ()
    tags: tuple[tuple[str, str], ...] = ()
    created: int | None = None
    """Milliseconds since 1970."""

    @property
    def label(self) -> str:
        """Name in tables and messages."""
        return f"{self.name} {self.version}" if self.version else f"run {short(self.run_id)}"

    @property
    def uri(self) -> str:
        """The name that the resolver takes, which means the same encoder for ever."""
        return f"models:/{self.name}/{self.version}" if self.version else f"runs:/{self.run_id}"

    def tag(self, name: str) -> str | None:
        """One of the version's tags."""
        return dict(self.tags).get(name)

    @property
    def source_run_ids(self) -> tuple[str, ...]:
        """Runs that downstream results may name as its source: its own, and for an import the one that trained it."""
        origin = self.tag(ORIGIN_RUN_TAG)
        return (self.run_id, origin) if origin else (self.run_id,)


def existing_store(tracking: TrackingConfig) -> Store | None:
    """The store, for a verb that only looks; None where the embedded one was never made, which looking must not do.

    Raises:
        InputError: it cannot be reached.
    """
    _, root = resolve_uri(tracking.uri, tracking.root)
    if root is not None and not (root / "mlflow.db").exists():
        return None
    return open_store(tracking.uri, tracking.root)


def needed_store(tracking: TrackingConfig) -> Store:
    """``existing_store``, or an ``InputError`` where there is none."""
    store = existing_store(tracking)
    if store is None:
        raise InputError(f"tracking.root is {tracking.root!r}: no store there; give --tracking.root or --tracking.uri")
    return store


def registered(store: Store, name: str | None = None) -> list[EncoderVersion]:
    """The encoders' versions under ``name``, or under every name, newest first."""
    if name is not None and "'" in name:
        raise InputError(f"name is {name!r}: a registered model's name has no quotes; use letters, digits and -")
    wanted = f"name = '{name}'" if name is not None else f"tags.`{DIGEST_TAG}` LIKE '_%'"
    with store_errors(store.uri):
        found = list(all_pages(store.client.search_model_versions, wanted, page=_PAGE))
        # of the model, since not every store has them with its versions
        aliases = {
            model: store.client.get_registered_model(model).aliases for model in {version.name for version in found}
        }
    versions = [_entry(version, aliases[version.name]) for version in found]
    return sorted(versions, key=lambda entry: (entry.created or 0, int(entry.version)), reverse=True)


def _entry(version: Any, aliases: Mapping[str, Any]) -> EncoderVersion:
    number = str(version.version)
    return EncoderVersion(
        name=version.name,
        version=number,
        run_id=version.run_id or "",
        aliases=tuple(sorted(alias for alias, owner in aliases.items() if str(owner) == number)),
        tags=tuple(sorted(version.tags.items())),
        created=version.creation_timestamp,
    )


def find_version(store: Store, what: str, name: str | None = None) -> EncoderVersion:
    """The encoder that ``what`` names.

    Args:
        what: a version's number or an alias of ``name``, ``models:/NAME/VERSION``, ``models:/NAME@ALIAS``, a run id
            (or as many of its digits as the tables show) or ``runs:/ID``. A run means its newest version, or the bare
            run if it was never registered.
        name: registered model; None means ``ENCODER_NAME``, or the only other one where that has no such version.

    Raises:
        InputError: there is none such, and the line names the nearest spelling; or there are several.
    """
    match = MODEL.fullmatch(what)
    if match:
        name, what = match["name"], match["version"] or match["alias"]
    elif what.startswith("models:/"):
        raise InputError(f"encoder {what!r}: not a model; use models:/NAME/VERSION or models:/NAME@ALIAS")
    versions = registered(store, name)
    entry = None if is_stored(what) else _labelled(versions, what, name)
    if entry is not None:
        return entry
    run_id = None if match else full_run_id(store, what)
    if run_id is not None:
        made = next((entry for entry in versions if entry.run_id == run_id), None)
        return made or EncoderVersion("", "", run_id, created=fetch_run(store, run_id).info.start_time)
    raise _unknown(store, versions, what, name)


def _labelled(versions: Sequence[EncoderVersion], what: str, name: str | None) -> EncoderVersion | None:
    """The version with this number or alias."""
    found = [entry for entry in versions if what == entry.version or what in entry.aliases]
    if what == LATEST and not found:  # MLflow's own alias: the highest number
        names = {entry.name for entry in versions}
        found = [max((e for e in versions if e.name == one), key=lambda e: int(e.version)) for one in names]
    if name is None:
        found = [entry for entry in found if entry.name == ENCODER_NAME] or found
    if len(found) > 1:
        uris = ", ".join(sorted(entry.uri for entry in found))
        raise InputError(f"encoder {what!r}: fits several ({uris}); give one of these")
    return found[0] if found else None


def _unknown(store: Store, versions: Sequence[EncoderVersion], what: str, name: str | None) -> InputError:
    if not versions:
        known = f"registered model {name!r}: not" if name else "no encoder is registered"
        names = sorted({entry.name for entry in registered(store)})
        return InputError(f"{known} in {store.public_uri}; {nearest(name or what, names) if names else ELSEWHERE}")
    owner = name or (ENCODER_NAME if any(entry.name == ENCODER_NAME for entry in versions) else versions[0].name)
    versions = [entry for entry in versions if entry.name == owner]
    if what.isdecimal():
        numbers = sorted((entry.version for entry in versions), key=int)
        return InputError(f"{owner} has no version {what}: there are {', '.join(numbers)}")
    aliases = sorted({alias for entry in versions for alias in entry.aliases} | {LATEST})
    return InputError(
        f"{owner} has no alias {what!r}: {nearest(what, aliases)}; or give a version's number or a run id"
    )
