"""A ViT with registers, a Swin, a ConvNeXt and an EfficientNet through every verb that takes an encoder."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from typing import NamedTuple

import mlflow
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from ca2cl.cli import main
from ca2cl.config import Pooling
from ca2cl.models.backbone import build_encoder
from ca2cl.models.encoder_io import EncoderCard, save_encoder
from ca2cl.registry.resolve import resolve_encoder
from tests.support.forked import ca2cl
from tests.support.jobs import make_shards

pytestmark = pytest.mark.slow


class Body(NamedTuple):
    """An architecture, its pooling, and the grid and length of its patch tokens at 64 pixels."""

    arch: str
    pooling: Pooling
    grid: tuple[int, int, int]


BODIES = {
    "vit": Body(
        "timm:vit_tiny_patch16_224,depth=2,embed_dim=48,init_values=0.1,num_heads=2,reg_tokens=2", "mean", (4, 4, 48)
    ),
    "swin": Body("timm:swin_tiny_patch4_window7_224,embed_dim=12,window_size=2", "default", (2, 2, 96)),
    "convnext": Body("timm:convnext_atto", "default", (2, 2, 320)),
    "efficientnet": Body("timm:tf_efficientnet_lite0", "default", (2, 2, 1280)),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_goes_through_every_verb(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = BODIES[name]
    train, test = (str(make_shards(tmp_path, count, seed=seed)) for seed, count in enumerate((8, 3)))
    torch.manual_seed(7)
    encoder = build_encoder(body.arch, image_size=64, pooling=body.pooling)
    card = EncoderCard(
        arch=body.arch, feature_dim=encoder.feature_dim, input_size=64, mean=(0.5,) * 3, std=(0.5,) * 3,
        pooling=body.pooling, licence="cc-by-4.0",
    )  # fmt: skip
    folder = save_encoder(tmp_path / "given", encoder.state_dict(), card)
    store = ["--tracking.root", str(tmp_path / "runs")]
    quick = ["--workers", "0", "--device", "cpu"]
    model = "models:/ca2cl-encoder/1"

    def verb(*arguments: str) -> str:
        capfd.readouterr()
        assert main([*arguments, *store]) == 0, capfd.readouterr().err
        return capfd.readouterr().out

    # registry and serving
    assert "ca2cl-encoder 1" in verb("encoders", "import", str(folder))
    assert "cc-by-4.0" in verb("encoders", "show", "1")
    png = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(png, "PNG")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/runs/mlflow.db")
    served = mlflow.pyfunc.load_model(model).predict([png.getvalue()])
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float().div(255).sub(0.5).div(0.5)
    with torch.inference_mode():
        features = encoder.eval()(x)
    np.testing.assert_allclose(served, features, rtol=1e-4, atol=1e-5)

    # probe: its own pooling, and every kind of tokens
    data = ["--train", train, "--test", test, "--labels", "1.0", "--seeds", "1"]
    out = verb("probe", "--encoder", model, *data, *quick, "--imagenet", "false", "--classifiers", "knn")
    assert "random encoder" in out
    if encoder.poolings:
        out = verb(
            "probe", "--encoder", model, *data, *quick, "--imagenet", "false", "--classifiers", "knn", "--tokens",
            "class", "mean", "both",
        )  # fmt: skip
        assert "encoder (both)" in out

    # fine-tuning at another size, with layer decay, beside random weights; the classifier is an encoder again
    done = ca2cl(
        tmp_path, "finetune", "--encoder", model, "--train", train, "--test", test, "--output_dir", "tuned", "--labels",
        "4", "--seeds", "1", "--epochs", "2", "--min_steps", "1", "--batch_size", "16", "--image_size", "96",
        "--workers", "0", "--optim.layer_decay", "0.01", "--optim.decay_all", "false", "--optim.name", "adamw",
        "--optim.lr", "0.001", *store, "--tracking.register_as", "tissue",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tuned = resolve_encoder("models:/tissue/1", root=tmp_path / "runs")
    assert (tuned.card.pooling, tuned.card.input_size, tuned.card.licence) == (body.pooling, 96, "cc-by-4.0")
    before, after = encoder.stem.weight.detach(), tuned.encoder.stem.weight.detach()
    assert (after - before).abs().max() < 1e-7  # its rate is that of the head by 0.01 to the number of layers
    assert any((one - other).abs().max() > 1e-6 for one, other in _pairs(encoder, tuned.encoder))
    predicted = mlflow.pyfunc.load_model("models:/tissue/1").predict([png.getvalue()])
    assert predicted["prediction"][0] in tuned.card.predicts

    # embeddings with patch tokens
    vectors = tmp_path / "v.safetensors"
    verb("embed", "--encoder", model, test, str(vectors), *quick, "--tokens", "patch")
    with safe_open(vectors, "np") as file:
        tokens, pooled = file.get_tensor("tokens"), file.get_tensor("vectors")
    assert tokens.shape == (len(pooled), *body.grid) and pooled.shape[1] == encoder.feature_dim

    # export, and back
    kinds = {"timm": "e.safetensors", "safetensors": "again"}
    kinds |= {"onnx": "e.onnx"} if importlib.util.find_spec("onnxruntime") else {}
    for kind, target in kinds.items():
        verb("export", "--encoder", model, "--to", kind, str(tmp_path / target))
    again = resolve_encoder(str(tmp_path / "again"))
    with torch.inference_mode():
        torch.testing.assert_close(again.encoder(x), features)
    assert json.loads((tmp_path / "again" / "card.json").read_text())["pooling"] == body.pooling

    # a page about it
    page = tmp_path / "page.html"
    verb("report", model, str(page), "--test", test, "--workers", "0", "--device", "cpu")
    assert page.stat().st_size > 10_000 and "k-NN" in page.read_text()


def _pairs(one: torch.nn.Module, other: torch.nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Parameters of equal shape; position embeddings and tables of relative positions have been resampled."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return [(a.detach(), b.detach()) for a, b in pairs if a.shape == b.shape]
