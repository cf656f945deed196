"""What MLflow's pages show of a run: its name."""

from __future__ import annotations

import pytest

from ca2cl.store.notes import short_name


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("runs:/0123456789abcdef0123456789abcdef", "01234567"),
        ("models:/ca2cl-encoder/3", "ca2cl-encoder/3"),
        ("/data/runs/first/encoder", "first"),
        ("/data/runs/first/best/", "best"),
        ("/data/weights/dino.safetensors", "dino.safetensors"),
        ("torchvision:IMAGENET1K_V1", "torchvision:IMAGENET1K_V1"),
        ("random:3", "random:3"),
    ],
)
def test_an_encoder_has_a_short_name(uri: str, name: str) -> None:
    assert short_name(uri) == name
