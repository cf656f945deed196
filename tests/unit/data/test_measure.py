"""``measure`` takes the JPEG and TIFF that ``decode`` takes, and no other."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from ca2cl.data import decode as module
from ca2cl.data.decode import BadSample, decode, measure

FORMS = {
    "420": {"format": "JPEG", "quality": 85, "subsampling": 2},
    "444": {"format": "JPEG", "quality": 85, "subsampling": 0},
    "progressive": {"format": "JPEG", "quality": 80, "progressive": True},
    "restarts": {"format": "JPEG", "quality": 80, "restart_marker_blocks": 4},
    "grey": {"format": "JPEG", "quality": 80},
    "tiff": {"format": "TIFF"},
}
LEFT_TO_PILLOW = {
    "cmyk": {"format": "JPEG"},
    "lzw": {"format": "TIFF", "compression": "tiff_lzw"},
    "png": {"format": "PNG"},
}
MODES = {"grey": "L", "cmyk": "CMYK"}


def encoded(form: str) -> bytes:
    y, x = np.mgrid[:40, :56]
    noise = np.random.default_rng(0).integers(0, 60, (40, 56, 3))
    pixels = (np.stack([x * 3, y * 4, x + y], -1) + noise).clip(0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(MODES.get(form, "RGB")).save(out, **{**FORMS, **LEFT_TO_PILLOW}[form])
    return out.getvalue()


def size_or_none(decoder: Callable[[bytes], tuple[int, int] | None], data: bytes) -> tuple[int, int] | None:
    try:
        return decoder(data)
    except BadSample:
        return None


@pytest.mark.parametrize("form", FORMS)
def test_sizes(form: str) -> None:
    assert measure(encoded(form), whole=True) == measure(encoded(form), whole=False) == (40, 56)


@pytest.mark.parametrize("form", LEFT_TO_PILLOW)
def test_what_is_left_to_pillow(form: str) -> None:
    assert measure(encoded(form), whole=True) is measure(encoded(form), whole=False) is None


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("form", FORMS)
def test_damaged_images_are_judged_as_decoding_judges_them(form: str) -> None:
    data, random = encoded(form), np.random.default_rng(1)
    taken = 0
    for _ in range(300):
        damaged = bytearray(data)
        if random.random() < 0.2:
            del damaged[int(random.integers(2, len(data))) :]
        for _ in range(int(random.integers(1, 4))):
            damaged[int(random.integers(2, len(damaged)))] = int(random.integers(256))
        wanted = size_or_none(lambda image: decode(image).shape[:2], bytes(damaged))  # type: ignore[arg-type, return-value]
        found = size_or_none(lambda image: measure(image, whole=True), bytes(damaged))
        assert found == wanted or (found is None and form == "tiff")  # Pillow takes more TIFFs
        taken += wanted is not None
    assert 0 < taken < 300


def test_a_whole_jpeg_is_not_decoded_to_its_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_jpeg_into", lambda *_: pytest.fail("decoded in full"))
    assert measure(encoded("420"), whole=True) == (40, 56)
