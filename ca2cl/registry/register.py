"""Register encoders in MLflow: files, pyfunc and model version.

The pyfunc is saved to a folder and uploaded as plain artifacts, and the version points at that folder. So nothing
depends on MLflow's global state, and MLflow 2 and 3 behave alike (3 moves what ``log_model`` writes out of the run:
mlflow#19036, #16947; ``register_model`` may drop artifacts: #18581).
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import ca2cl
from ca2cl.common.files import file_digest
from ca2cl.common.records import parse_json
from ca2cl.common.scratch import scratch_folder
from ca2cl.errors import InputError
from ca2cl.models.encoder_card import (
    CARD_NAME,
    ENCODER_PATH,
    WEIGHTS_NAME,
    EncoderCard,
    read_card,
    write_card,
)
from ca2cl.store.open import Store
from ca2cl.store.upload import upload

MODEL_PATH = "model"
CHAMPION = "champion"
DIGEST_TAG = "ca2cl.encoder_sha256"
INPUT_SIZE_TAG = "ca2cl.input_size"
MODELS_TAG = "mlflow.log-model.history"
_RUNTIME = (
    "mlflow", "torch", "torchvision", "numpy", "pandas", "safetensors", "pydantic", "simplejpeg", "pillow", "pyarrow",
)  # fmt: skip
_log = logging.getLogger(__name__)


def log_and_register(
    run_id: str, folder: str | Path, register_as: str | None, store: Store, alias: str | None = None
) -> str | None:  # fmt: skip
    """Upload an encoder to its run and make it the newest version of a registered model.

    ``models:/NAME@latest`` is MLflow's own alias for the newest version. The first version also becomes
    ``champion``; after that only ``ca2cl encoders promote`` moves it. Doing it again with the same weights and run
    changes nothing.

    Args:
        folder: what ``save_encoder`` wrote.
        register_as: name of the registered model, or None to upload only.
        alias: of an encoder beside the run's own, ``best``: it is uploaded under that name, and the alias of the
            registered model moves to it. It becomes no champion by itself.

    Returns:
        The version, or None if nothing was registered.

    Raises:
        InputError: the folder does not hold an encoder.
    """
    source = Path(folder)
    card = read_card(source / CARD_NAME)
    digest = digest_of(source / WEIGHTS_NAME)
    client = store.client
    tag = DIGEST_TAG if alias is None else f"ca2cl.{alias}_sha256"
    if client.get_run(run_id).data.tags.get(tag) != digest:
        upload(store, run_id, source, alias or ENCODER_PATH)
        with scratch_folder() as scratch:
            model = Path(scratch) / MODEL_PATH
            save_pyfunc(model, source, card)
            upload(store, run_id, model, _model_path(digest))
            _list_as_model(run_id, model, digest, store)
        client.set_tag(run_id, tag, digest)
    if not register_as:
        return None
    version = _register(run_id, register_as, digest, card, store)
    named = alias or (CHAMPION if CHAMPION not in client.get_registered_model(register_as).aliases else None)
    if named is not None:
        client.set_registered_model_alias(register_as, named, version)
    return version


def _list_as_model(run_id: str, model: Path, digest: str, store: Store) -> None:
    """Name the folder among the run's logged models, as ``log_model`` of MLflow 2 does.

    The pages of MLflow 2 and 3 then show it as a model, with its schema and how to load it.
    """
    import yaml

    meta = yaml.safe_load((model / "MLmodel").read_text(encoding="utf-8"))
    held = store.client.get_run(run_id).data.tags.get(MODELS_TAG, "[]")
    listed = [one for one in parse_json(held) if one.get("artifact_path") != _model_path(digest)]
    entry = {name: meta[name] for name in ("utc_time_created", "model_uuid")}
    flavors: dict[str, Any] = {name: {} for name in meta["flavors"]}  # not their paths on this machine
    listed.append({"run_id": run_id, "artifact_path": _model_path(digest), **entry, "flavors": flavors})
    store.client.set_tag(run_id, MODELS_TAG, json.dumps(listed))


def name_run(folder: Path, run_id: str) -> None:
    """Write into an encoder's card which run it is of, where it was trained before MLflow gave that run an id.

    Raises:
        InputError: the folder does not hold an encoder.
    """
    card = read_card(folder / CARD_NAME)
    if card.source_run_id is None:
        write_card(folder / CARD_NAME, replace(card, source_run_id=run_id))


def save_pyfunc(target: Path, folder: Path, card: EncoderCard) -> None:
    """Write the MLflow model of what is in ``folder``, encoder or classifier: this package's code, the two files, no
    pickle."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    from ca2cl.models.backbone import find_entry

    # no inputs: serving.py says why
    if card.predicts:
        code = "serve_classifier.py"
        columns = [ColSpec("string", "prediction")] + [ColSpec("float", f"probability_{n}") for n in card.predicts]
        signature = ModelSignature(outputs=Schema(columns))
    else:
        code = "serve_encoder.py"
        signature = ModelSignature(outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, card.feature_dim))]))
    entry = find_entry(card.arch)  # None for code outside this package, of whose needs nothing is known
    with _unchecked_requirements():
        mlflow.pyfunc.save_model(
            path=str(target),
            python_model=str(Path(__file__).with_name(code)),
            artifacts={"encoder": str(folder)},
            code_paths=[str(Path(ca2cl.__file__).parent)],
            pip_requirements=[_requirement(name) for name in (*_RUNTIME, *(entry.packages if entry else ()))],
            signature=signature,
            input_example=[_example(card.input_size)],
        )


@contextmanager
def _unchecked_requirements() -> Iterator[None]:
    """Leave out MLflow's comparison of the requirements with this environment, which they were just read from: it reads
    the list of files of every installed distribution, about a second."""
    from mlflow.utils import environment

    name = "warn_dependency_requirement_mismatches"
    check = getattr(environment, name, None)
    if check is None:
        yield
        return
    setattr(environment, name, lambda _requirements: None)
    try:
        yield
    finally:
        setattr(environment, name, check)


def _requirement(package: str) -> str:
    try:
        return f"{package}=={metadata.version(package).partition('+')[0]}"
    except metadata.PackageNotFoundError:  # where a run is sent from, its encoder's packages may be missing
        return package


def _example(side: int) -> bytes:
    """A plain grey tile as PNG: shows what to send."""
    out = io.BytesIO()
    Image.new("RGB", (side, side), (128, 128, 128)).save(out, "PNG")
    return out.getvalue()


def _register(run_id: str, name: str, digest: str, card: EncoderCard, store: Store) -> str:
    from mlflow.exceptions import MlflowException

    client = store.client
    try:
        client.create_registered_model(name, description=_describe_model(name, card))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    known = list(client.search_model_versions(f"name = '{name}'"))
    for version in known:
        if version.run_id == run_id and version.tags.get(DIGEST_TAG) == digest:
            return str(version.version)
    location = f"{client.get_run(run_id).info.artifact_uri.rstrip('/')}/{_model_path(digest)}"
    tags = {
        DIGEST_TAG: digest,
        "ca2cl.arch": card.arch,
        "ca2cl.step": str(card.step),
        INPUT_SIZE_TAG: str(card.input_size),
    }
    if card.manifest_digest:
        tags["ca2cl.manifest_digest"] = card.manifest_digest
    version = str(client.create_model_version(name, location, run_id, tags=tags).version)
    client.update_model_version(name, version, _describe(f"models:/{name}/{version}", card))
    _log.info("registered %s version %s", name, version)
    return version


def _describe_model(name: str, card: EncoderCard) -> str:
    """A registered model in Markdown."""
    what = "Tile classifiers fine-tuned" if card.predicts else "Tile encoders trained or imported"
    return (
        f"{what} by ca2cl. Use `models:/{name}@{CHAMPION}`, unless you need a certain version. "
        f"`ca2cl encoders list --name {name}` shows all versions with their results."
    )


def _describe(uri: str, card: EncoderCard) -> str:
    """A version in Markdown: its input, output and origin, and how to load it."""
    side = f"{card.input_size} x {card.input_size}"
    output = f"probabilities of {', '.join(card.predicts)}" if card.predicts else f"{card.feature_dim} features"
    start = f" from {card.start}" if card.start else ""
    trained = f", trained for {card.step:,} steps{start}" if card.step else start
    loaded = "with `predict`" if card.predicts else "a torch module"
    return (
        f"{card.arch}{trained}: tiles of {side} pixels to {output}. Data and settings are those of the source run.\n\n"
        f"- Python: `ca2cl.load_encoder('{uri}')`, {loaded}\n"
        f"- MLflow: `mlflow.pyfunc.load_model('{uri}').predict([jpeg_bytes, ...])`\n"
        f"- HTTP: `mlflow models serve -m {uri} --env-manager local`, then POST "
        '`{"inputs": ["BASE64 OF AN IMAGE", ...]}` to `/invocations`\n\n'
        "Input is any number of encoded images (JPEG, PNG, TIFF) of any size, in a list or in a column `image`. The "
        "schema below names no inputs, because MLflow would then take only one of these forms."
    )


def _model_path(digest: str) -> str:
    """A folder for these weights alone: a run that is trained further must not change a version that is registered."""
    return f"{MODEL_PATH}-{digest[:12]}"


def digest_of(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    try:
        return file_digest(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no weights here; give a folder that holds an encoder") from None
