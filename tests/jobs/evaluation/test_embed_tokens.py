"""``ca2cl embed --tokens``: patch tokens beside vectors, resumed part by part, for ViTs and feature maps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from ca2cl.config import IMAGENET_MEAN, IMAGENET_STD
from ca2cl.errors import InputError
from ca2cl.evaluation.embed.job import open_job
from ca2cl.evaluation.embed.run import run
from ca2cl.evaluation.embed.tiles import ShardTiles
from ca2cl.evaluation.embed.writer import open_vectors, read_about
from ca2cl.models.backbone import build_encoder
from ca2cl.models.encoder_io import EncoderCard, load_encoder, save_encoder
from ca2cl.models.preprocess import preprocess
from tests.support.embedding import TILES, config, damage, interrupt, make_tissue

VIT = "timm:vit_tiny_patch16_224,depth=1,embed_dim=24,num_heads=2,reg_tokens=2"


@pytest.fixture(scope="module")
def tissue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, and two encoders: ``encoder``, a ResNet-18, and ``vit``."""
    root = make_tissue(tmp_path_factory.mktemp("tokens"))
    torch.manual_seed(6)
    card = EncoderCard(arch=VIT, feature_dim=24, input_size=48, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    save_encoder(root / "vit", build_encoder(VIT, image_size=48).state_dict(), card)
    return root


def tile(tissue: Path, number: int) -> torch.Tensor:
    pixels = np.empty((48, 48, 3), np.uint8)
    ShardTiles(str(tissue / "shards"), None).fill(number, pixels)
    return torch.from_numpy(pixels)


def test_tokens_are_the_encoders_tile_by_tile_without_the_bad_ones(tissue: Path, tmp_path: Path) -> None:
    shards, (bad,) = damage(tissue, tmp_path / "shards", (7,))
    out = tmp_path / "v.safetensors"
    settings = config(
        tissue, out, source=shards, encoder=str(tissue / "vit"), tokens=("class", "patch"), max_bad_rate=0.5,
        token_dtype="float32", image_size=64,
    )  # fmt: skip
    assert run(settings) == 0
    found = load_file(out)
    assert found["tokens"].shape == (TILES - 1, 4, 4, 24) and found["vectors"].shape == (TILES - 1, 24)
    encoder, card = load_encoder(tissue / "vit")
    for row, number in ((0, 0), (6, 6), (7, 8), (TILES - 2, TILES - 1)):
        with torch.inference_mode():
            tokens = encoder.tokens(preprocess(tile(tissue, number)[None], 64, card.mean, card.std))
        np.testing.assert_allclose(found["tokens"][row], tokens.patches[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["vectors"][row], tokens.prefix[0, 0], rtol=1e-4, atol=1e-5)
    about = read_about(out)
    assert about is not None and about["pooling"] == "class" and about["data"]["undecodable_first"].keys() == {bad}
    assert about["tokens"] == {
        "grid": [4, 4], "dim": 24, "dtype": "float32", "patch_size": [16, 16], "image_size": 64,
        "order": "tile, row, column, feature",
    }  # fmt: skip
    keys = [json.loads(line)["key"] for line in (tmp_path / "v.keys.jsonl").read_text().splitlines()]
    assert len(keys) == TILES - 1 and bad not in keys
    np.testing.assert_array_equal(open_vectors(out), found["vectors"])


def test_vectors_do_not_keep_the_tokens_in_memory(tissue: Path, tmp_path: Path) -> None:
    job = open_job(config(tissue, tmp_path / "v.parquet", encoder=str(tissue / "vit")))
    made = job.encode(torch.stack([tile(tissue, number) for number in range(3)]), {})
    assert made.vectors.flags.c_contiguous and made.tokens is None  # a class token is a view of all tokens


def test_a_map_is_the_grid_of_a_convolutional_body_and_a_killed_job_goes_on(
    tissue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, out = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    assert run(config(tissue, whole, tokens=("patch",), image_size=64)) == 0
    settings = config(tissue, out, tokens=("patch",), image_size=64)
    parts = interrupt(monkeypatch, settings, after=3)
    torn = parts / "part-000001.tokens"
    torn.write_bytes(torn.read_bytes()[:-1])
    assert run(settings) == 0
    assert "part-000001.tokens: missing or cut short, made again" in caplog.text
    assert out.read_bytes() == whole.read_bytes() and not parts.exists()
    with safe_open(out, "np") as file:
        tokens, vectors = file.get_tensor("tokens"), file.get_tensor("vectors")
    assert tokens.shape == (TILES, 2, 2, 512) and tokens.dtype == np.float16
    np.testing.assert_allclose(tokens.astype(np.float64).mean((1, 2)), vectors, rtol=2e-3, atol=2e-3)
    assert run(settings) == 0  # complete
    with pytest.raises(InputError, match="of another job"):
        run(config(tissue, out, tokens=("patch",), image_size=64, token_dtype="float32"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"out": "v.parquet", "tokens": ("patch",)}, "Parquet has no arrays of patch tokens; give NAME.safetensors"),
        ({"tokens": ("class", "mean")}, "give one of class, mean and both, patch, or one and patch"),
        ({"tokens": ("class",)}, "a resnet18, has no tokens to pool; leave it out"),
        ({"encoder": "far", "tokens": ("patch",)}, "patch tokens that are not finite for 4 of 4 tiles"),
    ],
)
def test_what_cannot_be_written_is_refused_in_one_line(
    tissue: Path, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    if "encoder" in changes:  # features beyond float16, of which the vectors are finite
        encoder, card = load_encoder(tissue / "encoder")
        state = encoder.state_dict()
        for name in ("weight", "bias"):
            state[f"layer4.1.bn2.{name}"] = state[f"layer4.1.bn2.{name}"] * 0 + 1e6
        changes = {**changes, "encoder": str(save_encoder(tmp_path / "far", state, card))}
    out = tmp_path / str(changes.pop("out", "v.safetensors")) if "out" in changes else tmp_path / "v.safetensors"
    with pytest.raises(InputError) as error:
        run(config(tissue, out, **changes))
    assert words in str(error.value) and "\n" not in str(error.value)
    if "not finite" in words:
        assert str(error.value).endswith("or --token_dtype float32")
    assert not out.exists() and not out.with_name(f"{out.name}.parts").exists()
