"""``load_encoder``, ``embed`` and their input."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ca2cl
from ca2cl.errors import InputError
from ca2cl.evaluation.features import frozen
from ca2cl.models.encoder_io import save_encoder
from ca2cl.registry.resolve import resolve_encoder
from tests.support.shards import encode, random_tiles, write_shards

SIDE = 40
TILES = random_tiles(7, SIDE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder with a normalisation of its own, and a head of two classes."""
    found = resolve_encoder("random:3")
    card = replace(found.card, input_size=32, mean=(0.5, 0.4, 0.6), std=(0.2, 0.3, 0.25), predicts=("a", "b"))
    head = {"fc.weight": torch.randn(2, 512), "fc.bias": torch.randn(2)}
    return Path(save_encoder(tmp_path_factory.mktemp("api") / "encoder", found.encoder.state_dict() | head, card))


@pytest.fixture
def encoder(folder: Path) -> ca2cl.Encoder:
    return ca2cl.load_encoder(folder)


def features(folder: Path) -> torch.Tensor:
    """Of all tiles, as the verbs compute them."""
    found = resolve_encoder(str(folder))
    with torch.inference_mode():
        out = frozen(found.encoder, 32, found.card.mean, found.card.std)(torch.from_numpy(TILES))
    assert isinstance(out, torch.Tensor)
    return out


def paths(folder: Path) -> list[Path]:
    made = [folder / f"{number}.png" for number in range(len(TILES))]
    for path, tile in zip(made, TILES, strict=True):
        Image.fromarray(tile).save(path)
    return made


FORMS: dict[str, Any] = {
    "array": lambda folder: TILES,
    "planes": lambda folder: torch.from_numpy(TILES).movedim(-1, 1),
    "images": lambda folder: [Image.fromarray(tile) for tile in TILES],
    "arrays": lambda folder: list(TILES),
    "paths": paths,
    "shards": lambda folder: ca2cl.ShardDataset(
        write_shards(folder / "shards", [encode(tile) for tile in TILES], tile_size=(SIDE, SIDE))
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_vectors_are_those_of_the_verbs(form: str, folder: Path, encoder: ca2cl.Encoder, tmp_path: Path) -> None:
    vectors = ca2cl.embed(FORMS[form](tmp_path), encoder, batch_size=3)
    assert vectors.dtype == np.float32 and vectors.shape == (7, encoder.feature_dim)
    np.testing.assert_allclose(vectors, features(folder).numpy(), atol=1e-5)


def test_module_and_transform_give_the_same(folder: Path, encoder: ca2cl.Encoder) -> None:
    x = torch.stack([encoder.transform(Image.fromarray(tile)) for tile in TILES])
    assert x.shape == (7, 3, 32, 32) and x.dtype == torch.float32 and not encoder.training
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), features(folder), atol=1e-5, rtol=0)
        assert encoder.patch_tokens(x).shape == (7, 1, 1, 512)


def test_a_classifier_predicts(encoder: ca2cl.Encoder) -> None:
    x = encoder.transform(TILES)
    with torch.no_grad():
        probability = encoder.predict(x)
        wanted = (encoder(x) @ encoder.head.weight.T + encoder.head.bias).softmax(1)  # type: ignore[union-attr]
    assert encoder.classes == ("a", "b")
    torch.testing.assert_close(probability, wanted)
    with pytest.raises(ValueError, match="has no classifier"):
        ca2cl.load_encoder("random").predict(x)


def test_the_modules_mode_is_restored_and_it_can_be_trained(encoder: ca2cl.Encoder) -> None:
    encoder.train()
    ca2cl.embed(TILES, encoder)
    assert encoder.training
    encoder(encoder.transform(TILES)).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.backbone.parameters())


@pytest.mark.parametrize(
    ("tiles", "message"),
    [
        (TILES.astype(np.float32), "torch.float32 .*give a PIL image, or uint8"),
        (TILES[..., :2], r"\(7, 40, 40, 2\)"),
        (TILES[0], "give a batch"),
        ([], "tiles is empty"),
        (["nowhere.png"], "nowhere.png: no such file"),
        ([__file__], "test_encoder.py: .*"),
    ],
)
def test_bad_tiles_are_one_line(tiles: Any, message: str, encoder: ca2cl.Encoder) -> None:
    with pytest.raises(ValueError, match=message):
        ca2cl.embed(tiles, encoder)


def test_a_bad_source_is_one_line() -> None:
    with pytest.raises(InputError, match="nowhere"):
        ca2cl.load_encoder("/nowhere/encoder")
    with pytest.raises(InputError, match="device is 'cuda:99'"):
        ca2cl.load_encoder("random", device="cuda:99")
