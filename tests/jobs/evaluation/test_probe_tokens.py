"""``ca2cl probe --tokens``: class token, mean of patches or both, in tables, files, MLflow and comparisons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ca2cl.cli import main
from ca2cl.config import IMAGENET_MEAN
from ca2cl.data.shards.config import ShardConfig
from ca2cl.data.shards.run import run as shard
from ca2cl.data.synthetic.tissue import write_tissue
from ca2cl.evaluation.probe.config import ProbeConfig
from ca2cl.evaluation.probe.encoders import Contenders, find_contenders
from ca2cl.models.backbone import build_encoder
from ca2cl.models.encoder_io import EncoderCard, save_encoder
from ca2cl.registry.downstream import downstream_runs, newest_by_terms
from ca2cl.registry.resolve import resolve_encoder
from ca2cl.store.open import open_store

VIT = "timm:vit_tiny_patch16_224,depth=1,embed_dim=24,num_heads=2,reg_tokens=2"
SWIN = "timm:swin_tiny_patch4_window7_224,embed_dim=12,window_size=2"
RUN = "00112233445566778899aabbccddeeff"


def save(folder: Path, arch: str, **facts: Any) -> Path:
    torch.manual_seed(4)
    encoder = build_encoder(arch, image_size=facts.get("input_size", 64), pooling=facts.get("pooling", "default"))
    given = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "input_size": 64, "source_run_id": RUN, **facts}
    return save_encoder(folder, encoder.state_dict(), EncoderCard(arch=arch, feature_dim=encoder.feature_dim, **given))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of train and test, and encoders: a ViT that pools both, a Swin, a ResNet."""
    root = tmp_path_factory.mktemp("tokens")
    for name, count, seed in (("train", 4, 0), ("test", 2, 1)):
        write_tissue(root / f"{name}-tiles", count, size=64, seed=seed)
        assert shard(ShardConfig(source=str(root / f"{name}-tiles"), out=str(root / name), workers=1)) == 0
    save(root / "vit", VIT, pooling="both")
    save(root / "swin", SWIN)
    save(root / "resnet", "resnet18")
    return root


def probe(place: Path, folder: Path, *more: str, encoder: str = "vit", code: int = 0) -> dict[str, Any]:
    quick = ["--labels", "1.0", "--seeds", "1", "--classifiers", "knn", "--workers", "0", "--device", "cpu"]
    store = ["--tracking.root", str(place.parent.parent / "tracking-tests"), "--tracking.experiment", place.name]
    sets = ["--train", str(place / "train"), "--test", str(place / "test"), "--imagenet", "false"]
    output = folder / "probe.json"
    given = ["probe", "--encoder", str(place / encoder), "--output", str(output), *sets, *store, *quick, *more]
    assert main(given) == code
    return dict(json.loads(output.read_text())) if code == 0 else {}


def test_every_kind_of_tokens_is_a_row_and_runs_of_other_tokens_are_not_compared(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = f"{place}/resnet"
    content = probe(place, tmp_path, "--tokens", "mean", "class", "--against", other, "random:1", "--details")
    rows = [row["features"] for row in content["results"]]
    assert rows == [
        "encoder (mean)", "encoder (class)", other, "random:1 (mean)", "random:1 (class)", "colour histogram",
        "random encoder (mean)",
    ]  # fmt: skip
    assert content["tokens"] == ["mean", "class"]
    assert "encoder (mean) less encoder (class), k-NN" in capfd.readouterr().out
    plain = probe(place, tmp_path, "--against", other)
    assert plain["tokens"] == [] and plain["results"][0]["features"] == "encoder"
    store = open_store("", place.parent.parent / "tracking-tests")
    found = newest_by_terms(downstream_runs(store, RUN)[RUN])
    assert {terms.tokens for terms in found} == {"mean class", ""}
    run = next(one for terms, one in found.items() if terms.tokens)
    assert {"encoder/mean/k-NN/100pct/accuracy", "encoder/class/k-NN/100pct/accuracy"} <= run.metrics.keys()
    assert "tokens mean class" in str(run.terms) and run.terms.as_dict()["tokens"] == "mean class"


def test_features_are_the_tokens_that_were_asked_for(place: Path) -> None:
    config = ProbeConfig(
        encoder=str(place / "vit"), train="", test="t", tokens=("both", "class", "mean"), floors=True, imagenet=False,
        image_size=48,
    )  # fmt: skip
    contenders = find_contenders(config)
    tiles = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), dtype=np.uint8))
    with torch.inference_mode():
        made = contenders.extractors(config, torch.device("cpu"))["encoder"](tiles)
        assert not isinstance(made, torch.Tensor)
        x = tiles.permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.25)
        tokens = contenders.encoder.encoder.tokens(x)
    mean = tokens.patches.sum((1, 2)) / 9
    expected = {"class": tokens.prefix[:, 0], "mean": mean, "both": torch.cat([tokens.prefix[:, 0], mean], 1)}
    assert list(made) == [f"encoder ({way})" for way in ("both", "class", "mean")]
    for way, features in expected.items():
        torch.testing.assert_close(made[f"encoder ({way})"], features, rtol=1e-4, atol=1e-5)


def floor_of(encoder: Path) -> Contenders:
    return find_contenders(ProbeConfig(encoder=str(encoder), train="", test="t", imagenet=False))


def test_the_random_floor_differs_by_its_weights_alone(place: Path) -> None:
    """Pooling, size and normalisation are the encoder's; a Swin is made for one size."""
    for name in ("vit", "swin"):
        contenders = floor_of(place / name)
        first, floor = contenders.encoder.card, contenders.floors["random encoder"].card
        shared = ("arch", "pooling", "input_size", "mean", "std", "feature_dim")
        assert [getattr(floor, one) for one in shared] == [getattr(first, one) for one in shared]
        with torch.inference_mode():
            features = contenders.floors["random encoder"].encoder(torch.randn(1, 3, 64, 64))
        assert features.shape == (1, first.feature_dim)
    assert resolve_encoder("random", arch=VIT).card.mean == IMAGENET_MEAN  # with nothing to be compared with


def test_a_body_of_one_size_is_built_again_for_another(place: Path) -> None:
    found = resolve_encoder(str(place / "swin"))
    other = found.at(96)
    assert other.card.input_size == 96 and found.at(64) is found
    with torch.inference_mode():
        assert other.encoder(torch.randn(1, 3, 96, 96)).shape == (1, found.card.feature_dim)


@pytest.mark.parametrize(
    ("encoder", "tokens", "words"),
    [
        ("resnet", "mean", "a resnet18, has no tokens to pool"),
        ("swin", "both", "has no tokens to pool"),
        ("vit", "patch", "tokens"),
    ],
)
def test_a_body_without_tokens_is_refused_before_a_tile_is_read(
    place: Path, tmp_path: Path, encoder: str, tokens: str, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    probe(place, tmp_path, "--tokens", tokens, encoder=encoder, code=2)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("ca2cl: error: ") and words in line
