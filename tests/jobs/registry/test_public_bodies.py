"""timm's bodies from a file of weights to a run's start, the registry, exported files and a server."""

from __future__ import annotations

import dataclasses
import json
import urllib.request
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ca2cl.config import DataConfig, ModelConfig, TrackingConfig
from ca2cl.data.decode import decode
from ca2cl.export.run import TARGETS, export
from ca2cl.export.verify import sample_tiles
from ca2cl.models.backbone import Backbone
from ca2cl.models.encoder_io import EncoderCard, save_encoder
from ca2cl.models.preprocess import normalise_, preprocess
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.pretrain.start import find_start, initial_encoder
from ca2cl.registry.register import log_and_register
from ca2cl.registry.resolve import ResolvedEncoder, resolve_encoder
from ca2cl.store.open import Store, open_store
from tests.jobs.registry.test_serving import IMAGES, text
from tests.support.servers import ModelServer

BODIES = {
    "vit_small_patch16_224": (224, 160),
    "vit_base_patch16_reg4_gap_256": (256, 160),
    "vit_base_patch14_reg4_dinov2": (224, 140),
    "swin_tiny_patch4_window7_224": (224, 128),
    "convnext_tiny": (224, 160),
    "efficientnet_lite0": (224, 160),
    "resnet50d": (224, 160),
}
"""Two sizes of each: of the weights, and of another run's tiles."""
SERVED = "vit_base_patch16_reg4_gap_256"
"""The one that is served by HTTP too."""
CASES = [("test_vit", (64, 48)), *(pytest.param(name, sides, marks=pytest.mark.slow) for name, sides in BODIES.items())]


def timms(name: str, side: int, state: dict[str, Tensor] | None = None) -> nn.Module:
    """timm's own model for tiles of that size, with timm's own loading of ``state``."""
    size = {"img_size": side} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    given = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": state, "num_classes": 0}} if state else {}
    model: nn.Module = timm.create_model(name, num_classes=0, **size, **given)
    return model.eval()


def started(name: str, side: int, weights: Path) -> Backbone:
    """The encoder that a run from that file begins with."""
    config = PretrainConfig(
        model=ModelConfig(arch=f"timm:{name}", weights=str(weights)), data=DataConfig(image_size=side),
        tracking=TrackingConfig(root=str(weights.parent / "store")),
    )  # fmt: skip
    encoder = initial_encoder(*find_start(config))
    return encoder.eval()


@torch.inference_mode()
def far(found: Any, expected: Tensor) -> float:
    """Largest difference, relative to the largest feature."""
    found = torch.as_tensor(found)
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store("", tmp_path_factory.mktemp("store"))


@pytest.mark.parametrize(("name", "sides"), CASES)
def test_features_stay_timms_from_a_file_through_registry_export_and_serving(
    name: str, sides: tuple[int, int], store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    state = timms(name, sides[0]).state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "timms.safetensors")
    for side in sides:
        reference, encoder = timms(name, side, dict(state)), started(name, side, tmp_path / "timms.safetensors")
        x = torch.randn(2, 3, side, side)
        with torch.inference_mode():
            assert far(encoder(x), reference(x)) <= 1e-5, side
    found = registered(name, encoder, side, store, tmp_path)
    with torch.inference_mode():
        assert far(found.encoder(x), reference(x)) <= 1e-5, "registry"
    exported(found, reference, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    before = mlflow.get_tracking_uri()  # of a test before this one
    mlflow.set_tracking_uri(store.uri)
    model = mlflow.pyfunc.load_model(found.uri)
    mlflow.set_tracking_uri(before)
    features = model.predict(pd.DataFrame({"image": [text(image) for image in IMAGES]}))
    assert far(np.asarray(features, dtype=np.float32), of_images(found, reference)) <= 1e-5, "serving"
    if name == SERVED:
        assert far(over_http(found, store, tmp_path), of_images(found, reference)) <= 1e-5, "HTTP"


def registered(name: str, encoder: Backbone, side: int, store: Store, folder: Path) -> ResolvedEncoder:
    """The encoder from the registry."""
    card = EncoderCard(
        arch=f"timm:{name}", feature_dim=encoder.feature_dim, input_size=side, mean=(0.5, 0.4, 0.6),
        std=(0.2, 0.3, 0.25),
    )  # fmt: skip
    source = save_encoder(folder / "encoder", encoder.state_dict(), card)
    run_id = str(store.client.create_run(store.experiment_id("tests")).info.run_id)
    assert log_and_register(run_id, source, name, store) == "1"
    found = resolve_encoder(f"models:/{name}@champion", tracking_uri=store.uri)
    assert dataclasses.replace(found.card, source_run_id=None) == card
    return found


def exported(found: ResolvedEncoder, reference: nn.Module, folder: Path) -> None:
    """The files are timm's again, ONNX's, and this package's."""
    tiles = normalise_(sample_tiles(found.card.input_size), found.card.mean, found.card.std)
    with torch.inference_mode():
        expected = reference(tiles)
    for target, file in (("timm", "it.safetensors"), ("onnx", "it.onnx"), ("safetensors", "it")):
        assert "features differ by" in export(found, TARGETS[target], folder / file)
    import onnxruntime

    reference.load_state_dict(load_file(folder / "it.safetensors"), strict=True)
    with torch.inference_mode():
        assert far(reference(tiles), expected) <= 1e-5, "timm"
        assert far(resolve_encoder(str(folder / "it")).encoder(tiles), expected) <= 1e-5, "safetensors"
    session = onnxruntime.InferenceSession(str(folder / "it.onnx"), providers=["CPUExecutionProvider"])
    (onnx,) = session.run(None, {"tiles": sample_tiles(found.card.input_size).numpy()})
    assert far(onnx, expected) <= 1e-4, "ONNX"


@torch.inference_mode()
def of_images(found: ResolvedEncoder, reference: nn.Module) -> Tensor:
    """timm's features of the pictures, prepared as the card says."""
    card = found.card
    tiles = [
        preprocess(torch.from_numpy(decode(image))[None], card.input_size, card.mean, card.std) for image in IMAGES
    ]
    return torch.cat([reference(tile) for tile in tiles])


def over_http(found: ResolvedEncoder, store: Store, folder: Path) -> Any:
    """Features that ``mlflow models serve`` answers."""
    server = ModelServer(folder, found.uri, store.uri)
    try:
        server.start(patience=300)
        body = json.dumps({"inputs": [text(image) for image in IMAGES]}).encode()
        request = urllib.request.Request(f"{server.uri}/invocations", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return torch.tensor(json.load(answer)["predictions"])
    finally:
        server.stop()
