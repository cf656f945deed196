"""``mlflow models serve``: a registered encoder behind real HTTP, and a client's mistakes."""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ca2cl.data.decode import decode
from ca2cl.models.backbone import build_encoder
from ca2cl.models.encoder_io import EncoderCard, save_encoder
from ca2cl.models.preprocess import preprocess
from ca2cl.registry.register import log_and_register
from ca2cl.registry.resolve import ResolvedEncoder, resolve_encoder
from ca2cl.store.open import open_store
from tests.support.servers import ModelServer

SIDE = 48
MODEL = "models:/ca2cl-encoder@champion"


def picture(seed: int, kind: str, side: int = 60) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def text(image: bytes) -> str:
    return base64.b64encode(image).decode()


IMAGES = (picture(0, "JPEG"), picture(1, "PNG", 48), picture(2, "TIFF", 90))
GOOD = [text(image) for image in IMAGES]
CUT = text(IMAGES[0][:400])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ModelServer, ResolvedEncoder]]:
    """A server that was started elsewhere than where the store is, and the encoder that the resolver gives."""
    root = tmp_path_factory.mktemp("store")
    store = open_store("", root / "runs")
    torch.manual_seed(4)
    card = EncoderCard(arch="resnet18", feature_dim=512, input_size=SIDE, mean=(0.5, 0.4, 0.6), std=(0.2, 0.3, 0.25))
    folder = save_encoder(root / "encoder", build_encoder().state_dict(), card)
    run_id = str(store.client.create_run(store.experiment_id("tests")).info.run_id)
    assert log_and_register(run_id, folder, "ca2cl-encoder", store) == "1"
    server = ModelServer(tmp_path_factory.mktemp("elsewhere"), MODEL, store.uri, fresh=True)
    try:
        server.start(patience=180)
        yield server, resolve_encoder(MODEL, tracking_uri=store.uri)
    finally:
        server.stop()


def post(server: ModelServer, body: Any, kind: str = "application/json") -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{server.uri}/invocations", data, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def expected(found: ResolvedEncoder, images: tuple[bytes, ...]) -> np.ndarray:
    card = found.card
    tiles = [preprocess(torch.from_numpy(decode(image))[None], SIDE, card.mean, card.std) for image in images]
    with torch.inference_mode():
        return torch.cat([found.encoder(tile) for tile in tiles]).numpy()


FORMS: dict[str, Callable[[list[Any]], dict[str, Any]]] = {
    "inputs": lambda texts: {"inputs": texts},
    "inputs by name": lambda texts: {"inputs": {"image": texts}},
    "instances": lambda texts: {"instances": texts},
    "dataframe_split": lambda texts: {"dataframe_split": {"columns": ["image"], "data": [[one] for one in texts]}},
    "split, more columns": lambda texts: {
        "dataframe_split": {"columns": ["slide", "image"], "data": [["a", one] for one in texts]}
    },
    "dataframe_records": lambda texts: {"dataframe_records": [{"image": one} for one in texts]},
    "data URLs": lambda texts: {"inputs": [f"data:image/jpeg;base64,{one}" for one in texts]},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_resolvers_features(served: tuple[ModelServer, ResolvedEncoder], form: str) -> None:
    server, found = served
    status, answer = post(server, FORMS[form](GOOD))
    assert status == 200, answer
    features = np.asarray(answer["predictions"])
    assert features.shape == (3, 512)
    np.testing.assert_allclose(features, expected(found, IMAGES), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["inputs", "instances", "dataframe_split", "dataframe_records"])
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (CUT, "JPEG"),
        ("a text, not an image", "base64"),
        ("Grüße", "ASCII"),
        (text(b"base64 of no image at all"), "does not decode"),
        ("", "does not decode"),
        (None, "not the type of an image"),
    ],
)
def test_a_bad_image_is_named_by_its_row_and_the_server_goes_on(
    served: tuple[ModelServer, ResolvedEncoder], form: str, bad: Any, reason: str
) -> None:
    server, _ = served
    status, answer = post(server, FORMS[form]([GOOD[0], bad]))
    assert status == 400
    assert answer["message"].startswith("image in row 1: ") and reason in answer["message"], answer
    assert "stack_trace" not in answer and " at 0x" not in answer["message"]
    assert GOOD[0][:40] not in json.dumps(answer), "the request comes back in the complaint"
    status, answer = post(server, FORMS[form](GOOD[:1]))
    assert status == 200 and np.shape(answer["predictions"]) == (1, 512)


@pytest.mark.parametrize("form", ["inputs", "instances", "dataframe_split", "dataframe_records"])
def test_no_images_give_no_features(served: tuple[ModelServer, ResolvedEncoder], form: str) -> None:
    assert post(served[0], FORMS[form]([])) == (200, {"predictions": []})


def test_an_image_of_one_pixel_is_resized_like_any_other(served: tuple[ModelServer, ResolvedEncoder]) -> None:
    server, found = served
    pixel = picture(3, "PNG", 1)
    status, answer = post(server, {"inputs": [text(pixel)]})
    assert status == 200
    np.testing.assert_allclose(answer["predictions"], expected(found, (pixel,)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"dataframe_records": [{"tile": GOOD[0], "slide": "a"}]}, "send the images in one called 'image'"),
        (b"no JSON", "valid JSON"),
        ([], "Received a list"),
        ({"images": GOOD}, "must be a JSON dictionary"),
    ],
)
def test_a_body_of_another_form_is_refused(
    served: tuple[ModelServer, ResolvedEncoder], body: Any, message: str
) -> None:
    server, _ = served
    status, answer = post(server, body)
    assert status == 400 and message in answer["message"]
    assert post(server, {"inputs": GOOD[:1]})[0] == 200
