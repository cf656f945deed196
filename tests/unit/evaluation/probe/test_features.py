"""Frozen features: what frozen means, and that nothing gets lost or mixed on the way."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ca2cl.config import IMAGENET_MEAN, IMAGENET_STD
from ca2cl.errors import InputError
from ca2cl.evaluation.features import colour_histogram, extract, frozen
from ca2cl.models.backbone import build_encoder
from ca2cl.models.preprocess import preprocess

TILES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (10, 40, 40, 3), dtype=np.uint8))
CPU = torch.device("cpu")


def batches(size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for start in range(0, len(TILES), size):
        rows = torch.arange(start, min(start + size, len(TILES)))
        yield TILES[rows], rows % 3, 100 + rows


def test_features_are_the_encoders_in_eval_mode_whatever_the_batch() -> None:
    torch.manual_seed(0)
    encoder = build_encoder("resnet18")
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    extractors = {"encoder": frozen(encoder, 32, IMAGENET_MEAN, IMAGENET_STD), "colours": colour_histogram}
    by_four, by_ten = (extract(batches(size), extractors, total=10, device=CPU, title="t") for size in (4, 10))
    with torch.inference_mode():
        expected = encoder.eval()(preprocess(TILES, 32, IMAGENET_MEAN, IMAGENET_STD)).numpy()
    np.testing.assert_allclose(by_ten.values["encoder"], expected, atol=1e-5)
    np.testing.assert_allclose(by_four.values["encoder"], by_ten.values["encoder"], atol=1e-5)
    assert by_four.values["colours"].shape == (10, 96)
    assert all(torch.equal(state[name], tensor) for name, tensor in encoder.state_dict().items())


def test_labels_and_sample_numbers_stay_with_their_tiles() -> None:
    found = extract(batches(3), {"colours": colour_histogram}, total=10, device=CPU, title="t")
    assert found.samples_N.tolist() == list(range(100, 110))
    assert found.labels_N.tolist() == [n % 3 for n in range(10)]
    assert len(found) == len(set(found.pixels_N)) == 10


def test_the_same_pixels_have_the_same_digest() -> None:
    twice = [(TILES[:2], torch.zeros(2), torch.arange(2)), (TILES[1:3].clone(), torch.zeros(2), torch.arange(2))]
    found = extract(twice, {}, total=4, device=CPU, title="t")
    assert found.pixels_N[1] == found.pixels_N[2]
    assert len(set(found.pixels_N)) == 3


def test_no_tiles_and_diverged_encoders_are_refused() -> None:
    with pytest.raises(InputError, match="none of 7 tiles"):
        extract([], {}, total=7, device=CPU, title="test")
    with pytest.raises(InputError, match=r"encoder gives features that are not finite for 10 tiles"):
        nan = {"encoder": lambda tiles: torch.full((len(tiles), 2), float("nan"))}
        extract(batches(10), nan, total=10, device=CPU, title="test")


def test_features_that_are_a_view_do_not_keep_what_they_are_of() -> None:
    """A class token is a view of all tokens."""
    kept: list[StorageWeakRef] = []

    def class_token(tiles: torch.Tensor) -> torch.Tensor:
        assert all(one.expired() for one in kept[:-1])  # the last one is still a variable of the loop
        tokens = torch.ones(len(tiles), 50, 8)
        kept.append(StorageWeakRef(tokens.untyped_storage()))
        return tokens[:, 0]

    assert extract(batches(2), {"class": class_token}, total=10, device=CPU, title="t").values["class"].shape == (10, 8)
    assert len(kept) == 5
