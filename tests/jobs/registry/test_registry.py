"""The registry: cards are checked, nothing is pickled, the pyfunc answers with the encoder's own numbers."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from ca2cl.data.decode import decode
from ca2cl.errors import InputError
from ca2cl.models.backbone import build_encoder
from ca2cl.models.encoder_io import (
    CARD_NAME,
    WEIGHTS_NAME,
    EncoderCard,
    load_encoder,
    make_encoder,
    read_card,
    save_encoder,
)
from ca2cl.models.preprocess import preprocess
from ca2cl.registry.register import MODELS_TAG, log_and_register
from ca2cl.registry.resolve import resolve_encoder
from ca2cl.store.open import Store, open_store

CARD = EncoderCard(
    arch="resnet18",
    feature_dim=512,
    input_size=48,
    mean=(0.5, 0.4, 0.6),
    std=(0.2, 0.3, 0.25),
    classes=("A", "B"),
    step=7,
    metrics={"loss": 1.5},
)


def weights(seed: int, arch: str = "resnet18") -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return build_encoder(arch).state_dict()


def picture(seed: int, kind: str, side: int = 60) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store("", tmp_path_factory.getbasetemp() / "tracking-tests")  # shared: making one takes seconds


@pytest.fixture(scope="module")
def registered(store: Store, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An encoder's folder, registered as version 1 of ``served``, and the run that it belongs to."""
    folder = save_encoder(tmp_path_factory.mktemp("encoder"), weights(1), CARD)
    run_id = str(store.client.create_run(store.experiment_id("tests")).info.run_id)
    assert log_and_register(run_id, folder, "served", store) == "1"
    return folder, run_id


@pytest.fixture
def served(store: Store, registered: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(store.uri)
    yield mlflow.pyfunc.load_model("models:/served@latest")
    mlflow.set_tracking_uri(before)


def test_a_version_says_how_to_use_it_and_its_run_lists_it_as_a_model(
    store: Store, registered: tuple[Path, str]
) -> None:
    version = store.client.get_model_version("served", "1")
    assert "ca2cl.load_encoder('models:/served/1')" in version.description
    assert "models:/served@champion" in store.client.get_registered_model("served").description
    (listed,) = json.loads(store.client.get_run(registered[1]).data.tags[MODELS_TAG])
    assert version.source.endswith(listed["artifact_path"]) and "python_function" in listed["flavors"]


def test_an_encoder_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    state = weights(0)
    encoder, card = load_encoder(save_encoder(tmp_path, state, CARD))
    assert card == CARD and not encoder.training
    assert all(torch.equal(tensor, encoder.state_dict()[name]) for name, tensor in state.items())
    assert not any(name.startswith("fc") for name in encoder.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "newer"),
        ({"arch": "vit"}, "vit"),
        ({"std": [0.1, 0.0, 0.1]}, "std"),
        ({"mean": "abc"}, "mean"),
        ({"feature_dim": "512"}, "feature_dim"),
        ({"input_size": None}, "input_size"),
    ],
)
def test_a_wrong_card_is_one_clear_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / CARD_NAME
    path.write_text(json.dumps(dataclasses.asdict(CARD) | change))
    with pytest.raises(InputError, match=message) as caught:
        read_card(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", "\x00", '{"schema_version": 1}'])
def test_a_damaged_card_is_one_clear_line(tmp_path: Path, text: str) -> None:
    (tmp_path / CARD_NAME).write_text(text)
    with pytest.raises(InputError, match="export the encoder again"):
        read_card(tmp_path / CARD_NAME)


def test_truncated_weights_are_one_clear_line(tmp_path: Path) -> None:
    save_encoder(tmp_path, weights(0), CARD)
    path = tmp_path / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_encoder(tmp_path)


def test_every_backbone_tensor_must_be_given_and_used() -> None:
    state = weights(0)
    missing = {name: tensor for name, tensor in state.items() if not name.startswith("layer4.1.conv")}
    with pytest.raises(
        InputError, match=r"118 of 120 .* 2 missing \(first layer4.1.conv1.weight, layer4.1.conv2.weight\)"
    ):
        make_encoder(missing, "resnet18", "x")
    with pytest.raises(InputError, match=r"1 unexpected \(first stray\)"):
        make_encoder({**state, "stray": torch.zeros(1)}, "resnet18", "x")
    with pytest.raises(InputError, match="not a resnet50"):
        make_encoder(state, "resnet50", "x")
    without_counters = {name: tensor for name, tensor in state.items() if "num_batches" not in name}
    make_encoder({**without_counters, "fc.weight": torch.zeros(9, 512)}, "resnet18", "x")


def test_nothing_in_the_logged_run_is_a_pickle(store: Store, registered: tuple[Path, str]) -> None:
    root = store.root
    assert root is not None
    files = [path for path in (root / "artifacts" / registered[1]).rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {WEIGHTS_NAME, CARD_NAME, "MLmodel", "serve_encoder.py"} <= names
    assert not {path.suffix for path in files} & {".pkl", ".pickle", ".pt", ".pth", ".bin", ".pyc"}
    assert not any(path.read_bytes()[:2] in (b"\x80\x04", b"\x80\x05", b"\x80\x02") for path in files)


def test_registering_again_changes_nothing_and_new_weights_make_a_new_version(
    store: Store, registered: tuple[Path, str], tmp_path: Path
) -> None:
    folder, run_id = registered
    assert log_and_register(run_id, folder, "twice", store) == "1"
    assert log_and_register(run_id, folder, "twice", store) == "1"
    other = str(store.client.create_run(store.experiment_id("tests")).info.run_id)
    assert log_and_register(other, save_encoder(tmp_path, weights(2), CARD), "twice", store) == "2"
    assert store.client.get_model_version_by_alias("twice", "latest").version in (2, "2")
    assert store.client.get_model_version_by_alias("twice", "champion").version in (1, "1")


def test_a_run_that_is_trained_further_leaves_its_registered_version_alone(store: Store, tmp_path: Path) -> None:
    run_id = str(store.client.create_run(store.experiment_id("tests")).info.run_id)
    for version in (1, 2):
        folder = save_encoder(tmp_path / str(version), weights(version), CARD)
        assert log_and_register(run_id, folder, "further", store) == str(version)
    for version in (1, 2):
        found = resolve_encoder(f"models:/further/{version}", tracking_uri=store.uri).encoder
        for name, value in weights(version).items():
            assert torch.equal(found.state_dict()[name], value), (version, name)


def test_the_pyfunc_gives_the_encoders_numbers_for_every_container(served: Any, registered: tuple[Path, str]) -> None:
    images = [picture(0, "JPEG"), picture(1, "PNG", 48), picture(2, "TIFF", 90)]
    encoder, card = load_encoder(registered[0])
    tiles = [preprocess(torch.from_numpy(decode(image))[None], 48, card.mean, card.std) for image in images]
    with torch.inference_mode():
        expected = torch.cat([encoder(tile) for tile in tiles]).numpy()
    texts = [base64.b64encode(image).decode() for image in images]
    containers = [
        images,
        np.array(images, dtype=object),
        pd.DataFrame({"image": images}),
        pd.Series(images),
        texts,
        pd.DataFrame({"tile": texts}),
        {"image": images},
    ]
    for container in containers:
        features = served.predict(container)
        assert features.shape == (3, 512) and features.dtype == np.float32
        np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-5)


def test_more_images_than_a_chunk_keep_their_order(served: Any) -> None:
    first, second = picture(0, "PNG", 48), picture(1, "PNG", 48)
    features = served.predict([first] * 70 + [second])
    alone = served.predict([second])
    assert features.shape == (71, 512)
    np.testing.assert_allclose(features[70], alone[0], rtol=1e-4, atol=1e-5)
    assert not np.allclose(features[0], features[70], atol=1e-3)


@pytest.mark.parametrize("bad", [b"not an image", "%%%", picture(0, "JPEG")[:200]])
def test_a_bad_image_is_named_by_its_row(served: Any, bad: Any) -> None:
    with pytest.raises(ValueError, match="row 1"):
        served.predict(pd.DataFrame({"image": [picture(0, "JPEG"), bad]}))


@pytest.mark.parametrize("form", ["inputs", "instances", "dataframe_split", "dataframe_records", "example"])
def test_the_scoring_server_takes_base64_in_every_form(
    served: Any, store: Store, registered: tuple[Path, str], form: str
) -> None:
    from mlflow.pyfunc.scoring_server import invocations

    images = [picture(0, "JPEG"), picture(1, "PNG", 48)]
    texts = [base64.b64encode(image).decode() for image in images]
    assert store.root is not None
    example = next((store.root / "artifacts" / registered[1]).rglob("serving_input_example.json")).read_text()
    bodies: dict[str, Any] = {
        "inputs": {"inputs": texts},
        "instances": {"instances": texts},
        "dataframe_split": {"dataframe_split": {"columns": ["image"], "data": [[text] for text in texts]}},
        "dataframe_records": {"dataframe_records": [{"image": text} for text in texts]},
        "example": json.loads(example),
    }
    answer = invocations(json.dumps(bodies[form]), "application/json", served, served.metadata.get_input_schema())
    assert answer.status == 200, answer.response
    features = np.asarray(json.loads(answer.response)["predictions"])
    if form == "example":
        assert features.shape == (1, 512)
    else:
        np.testing.assert_allclose(features, served.predict(images), rtol=1e-5, atol=1e-5)
