"""``ca2cl encoders import``: register an encoder from elsewhere."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from ca2cl import __version__
from ca2cl.common.console.summary import closing
from ca2cl.common.files import writing
from ca2cl.common.redact import redact
from ca2cl.common.scratch import scratch_folder
from ca2cl.data.fingerprints.seen import write_seen
from ca2cl.encoders.import_.config import ImportConfig
from ca2cl.encoders.show import fetch_card
from ca2cl.errors import InputError
from ca2cl.models.encoder_io import ENCODER_PATH, WEIGHTS_NAME, EncoderCard, save_encoder
from ca2cl.registry.register import DIGEST_TAG, digest_of, log_and_register
from ca2cl.registry.resolve import ResolvedEncoder, resolve_encoder
from ca2cl.registry.versions import ORIGIN_RUN_TAG, EncoderVersion, find_version, registered
from ca2cl.store.locate import store_flag
from ca2cl.store.notes import description_tag
from ca2cl.store.open import Store, open_store, store_errors
from ca2cl.tracking.run_record import create_mlflow_run

KIND = "import"
_INPUT = ("mean", "std", "mpp")
_REMEDY = "free some space there, or set TMPDIR to a folder with more"


def run(config: ImportConfig) -> int:
    """Register the encoder and print its version. Returns the exit code.

    Raises:
        InputError: the source is no encoder, or the store cannot be used.
    """
    tracking = config.tracking
    found = resolve_encoder(config.source, tracking_uri=tracking.uri, root=tracking.root, arch=config.arch)
    store = open_store(tracking.uri, tracking.root)
    with scratch_folder() as scratch:
        folder = Path(scratch) / ENCODER_PATH
        card = _card(found, config)
        with writing(folder, _REMEDY):
            save_encoder(folder, found.encoder.state_dict(), card)
            write_seen(folder, found.seen)
        digest = digest_of(folder / WEIGHTS_NAME)
        card = dataclasses.replace(card, origin_sha256=found.start.sha256 if found.start else digest)
        known = _registered_before(store, config.name, digest, card)
        if known:
            sys.stdout.write(f"{known.label} already has exactly these weights, nothing was registered\n")
            return 0
        run_id, version = _register(store, config, found, folder, card)
    made = find_version(store, version, config.name)
    sys.stdout.write(
        f"{made.label}: {card.arch}, {card.input_size} px, from {card.origin} (sha256 {card.origin_sha256}), "
        f"run {run_id}{''.join(f', the first and so {alias}' for alias in made.aliases)}\n"
    )
    probe = ["ca2cl", "probe", "--encoder", made.uri, "--train", "LABELLED_SHARDS", "--test", "TEST_SHARDS"]
    probe += store_flag(tracking.uri, tracking.root)
    sys.stdout.write(closing(f"encoder {made.uri}", store.place, probe))
    return 0


def _card(found: ResolvedEncoder, config: ImportConfig) -> EncoderCard:
    _check_input(found, config)
    path = Path(config.source).expanduser()
    origin = str(path.resolve()) if path.exists() else found.uri
    return dataclasses.replace(
        found.card,
        input_size=config.input_size or found.card.input_size,
        mean=config.mean or found.card.mean,
        std=config.std or found.card.std,
        mpp=config.mpp or found.card.mpp,
        predicts=(),  # a classifier's encoder is imported without its head
        origin=redact(origin),
        origin_run_id=found.source_run_id,
        source_run_id=None,
    )


def _check_input(found: ResolvedEncoder, config: ImportConfig) -> None:
    """Refuse to contradict what the source states.

    Raises:
        InputError: it states another mean, standard deviation or resolution.
    """
    stated = {"mpp": found.card.mpp} if found.bare else {name: getattr(found.card, name) for name in _INPUT}
    for name, value in stated.items():
        given = getattr(config, name)
        if None not in (given, value) and given != value:
            raise InputError(f"{name} is {given}: the source states {value}; leave it out")


def _registered_before(store: Store, name: str, digest: str, card: EncoderCard) -> EncoderVersion | None:
    """The version with the same weights that also takes its tiles the same way."""
    for entry in registered(store, name):
        if entry.tag(DIGEST_TAG) != digest:
            continue
        try:
            other = fetch_card(store, entry)
        except InputError:  # its files are gone: the very reason to import it again
            continue
        if all(getattr(other, name) == getattr(card, name) for name in ("arch", "input_size", *_INPUT)):
            return entry
    return None


def _register(
    store: Store, config: ImportConfig, found: ResolvedEncoder, folder: Path, card: EncoderCard
) -> tuple[str, str]:
    """A finished run of the kind import, and its version; a run that does not get so far ends as FAILED."""
    licence = f", licence {card.licence}" if card.licence else ""
    about = f"Import of `{card.origin}`: {card.arch}, tiles of {card.input_size} pixels{licence}."
    tags = {
        "ca2cl.kind": KIND,
        **description_tag(about),
        **({ORIGIN_RUN_TAG: card.origin_run_id} if card.origin_run_id else {}),
    }
    run_name = config.tracking.run_name or f"{KIND} {Path(card.origin or '').name}"
    run_id = create_mlflow_run(store, store.experiment_id(config.tracking.experiment), run_name, tags)
    params = {
        "source": card.origin,
        "source_sha256": card.origin_sha256,
        "arch": card.arch,
        "input_size": card.input_size,
        **({"licence": card.licence} if card.licence else {}),
        "ca2cl": __version__,
    }
    client = store.client
    with store_errors(store.uri):
        try:
            for name, value in params.items():
                client.log_param(run_id, name, value)
            # downstream runs are tied to this run: the store may never have had the one that trained it
            with writing(folder, _REMEDY):
                save_encoder(folder, found.encoder.state_dict(), dataclasses.replace(card, source_run_id=run_id))
            version = log_and_register(run_id, folder, config.name, store)
            assert version is not None
            if card.origin_run_id:
                client.set_model_version_tag(config.name, version, ORIGIN_RUN_TAG, card.origin_run_id)
            client.set_terminated(run_id, "FINISHED")
        except BaseException:
            client.set_terminated(run_id, "FAILED")
            raise
    return run_id, version
