"""Encoded bytes become exactly the pixels they encode, or a BadSample."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ca2cl.data import decode as module
from ca2cl.data.decode import BadSample, decode
from ca2cl.data.orientation import orientation_of
from ca2cl.data.shards.writer import image_size
from tests.support.shards import encode


def smooth(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 3 + y, 255 - y * 2, 128 + 40 * np.sin(x / 3)], -1).clip(0, 255).astype(np.uint8)


def tiff(pixels: np.ndarray, *, order: str = "<", rows: int | None = None, gap: int = 0, **changed: object) -> bytes:
    """An uncompressed TIFF written from the specification: strips of ``rows``, ``gap`` bytes between them."""
    height, width, _ = pixels.shape
    rows = rows or height
    strips = [pixels[i : i + rows].tobytes() for i in range(0, height, rows)]
    body, offsets = b"", []
    for strip in strips:
        offsets.append(8 + len(body))
        body += strip + b"\xaa" * gap
    tags = {
        256: ("H", [width]), 257: ("I", [height]), 258: ("H", [8, 8, 8]), 259: ("H", [1]), 262: ("H", [2]),
        273: ("I", offsets), 277: ("H", [3]), 278: ("H", [rows]), 279: ("I", [len(s) for s in strips]),
        284: ("H", [1]),
    }  # fmt: skip
    tags.update({int(name[1:]): value for name, value in changed.items()})
    kinds = {"B": 1, "H": 3, "I": 4}
    at = 8 + len(body)
    extra_at = at + 2 + 12 * len(tags) + 4
    entries, extra = b"", b""
    for tag, (code, values) in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}{code}", *values)
        if len(packed) > 4:
            field, extra = struct.pack(order + "I", extra_at + len(extra)), extra + packed
        else:
            field = packed.ljust(4, b"\0")
        entries += struct.pack(order + "HHI", tag, kinds[code], len(values)) + field
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, at)
    return head + body + struct.pack(order + "H", len(tags)) + entries + b"\0\0\0\0" + extra


def pillow(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_give_the_pixels_back(kind: str) -> None:
    pixels = smooth(33, 21)
    out = decode(encode(pixels, kind), expect=(33, 21))
    assert out.dtype == np.uint8 and out.flags.c_contiguous and out.flags.writeable
    assert np.array_equal(out, pixels)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("side", [64, 61])
def test_jpeg_equals_pillow_exactly(side: int, subsampling: int) -> None:
    data = encode(smooth(side, side), "JPEG", quality=85, subsampling=subsampling)
    assert np.array_equal(decode(data), pillow(data))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpeg_of_other_colours_equals_pillow(mode: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(smooth(32, 32)).convert(mode).save(buffer, "JPEG")
    assert np.array_equal(decode(buffer.getvalue()), pillow(buffer.getvalue()))


def test_webp_and_palettes_go_through_pillow() -> None:
    pixels = smooth(20, 20)
    assert np.array_equal(decode(encode(pixels, "WEBP", lossless=True)), pixels)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("P").save(buffer, "PNG")
    assert np.array_equal(decode(buffer.getvalue()), pillow(buffer.getvalue()))


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(1, 12), width=st.integers(1, 12), rows=st.integers(1, 13), gap=st.integers(0, 3),
    order=st.sampled_from("<>"), seed=st.integers(0, 9),
)  # fmt: skip
def test_plain_tiff_of_any_strips_and_byte_order(
    height: int, width: int, rows: int, gap: int, order: str, seed: int
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    data = tiff(pixels, order=order, rows=rows, gap=gap)
    assert np.array_equal(pillow(data), pixels)
    assert module._plain_tiff(data, None) is not None, "must not fall back to Pillow"
    assert np.array_equal(decode(data, expect=(height, width)), pixels)


@pytest.mark.parametrize("options", [{"compression": "tiff_lzw"}, {"compression": "jpeg"}, {"compression": "packbits"}])
def test_other_tiffs_are_left_to_pillow(options: dict[str, str]) -> None:
    data = encode(smooth(24, 24), "TIFF", **options)
    assert module._plain_tiff(data, None) is None
    assert np.array_equal(decode(data), pillow(data))


@pytest.mark.parametrize("tag", [256, 257, 258, 273, 277, 278, 279, 284])
def test_a_tiff_tag_without_a_value_is_left_to_pillow(tag: int) -> None:
    data = tiff(smooth(6, 8), **{f"t{tag}": ("H", [])})
    assert module._plain_tiff(data, None) is None
    try:
        assert decode(data).shape == (6, 8, 3)
    except BadSample as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "plain", "packbits", "WEBP"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_pixels_are_as_stored_whatever_says_that_they_are_to_be_turned(kind: str, orientation: int) -> None:
    pixels, exif = smooth(24, 16), Image.Exif()
    exif[274] = orientation
    options = {"packbits": {"compression": "packbits"}, "WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(
        kind, {}
    )
    name = {"plain": "TIFF", "packbits": "TIFF"}.get(kind, kind)
    if kind == "plain":
        upright, turned = tiff(pixels), tiff(pixels, _274=("H", [orientation]))
    else:
        upright, turned = encode(pixels, name, **options), encode(pixels, name, exif=exif, **options)
    assert (orientation_of(upright), orientation_of(turned)) == (1, orientation)
    assert np.array_equal(decode(turned, expect=(24, 16)), decode(upright))
    out = np.empty((24, 16, 3), np.uint8)
    decode(turned, out_HWC=out)
    assert np.array_equal(out, decode(upright))
    assert image_size(turned, "x") == (24, 16)


def test_an_orientation_in_words_and_one_that_is_none() -> None:
    """XMP as Lightroom and phones write it; a tag that means nothing; damaged tags."""
    words = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF tiff:Orientation="8"/></x:xmpmeta>'
    assert orientation_of(encode(smooth(8, 8), "JPEG", xmp=words)) == 8
    exif = Image.Exif()
    exif[274] = 99
    assert orientation_of(encode(smooth(8, 8), "PNG", exif=exif)) == 1
    whole = encode(smooth(8, 8), "JPEG", exif=exif)
    for cut in (b"", b"II*\0", whole[:40], whole.replace(b"Exif\0\0MM", b"Exif\0\0XX")):
        assert orientation_of(cut) == 1


@settings(deadline=None, max_examples=150)
@given(cut=st.floats(0, 0.999), flip=st.integers(0, 10**6), kind=st.sampled_from(["JPEG", "PNG", "TIFF", "plain"]))
def test_damaged_bytes_decode_or_are_bad_samples_and_nothing_else(cut: float, flip: int, kind: str) -> None:
    pixels = smooth(16, 16)
    data = bytearray(tiff(pixels, rows=5) if kind == "plain" else encode(pixels, kind))
    data[flip % len(data)] ^= 1 << (flip % 8)
    for damaged in (bytes(data), bytes(data[: int(cut * len(data))])):
        try:
            assert decode(damaged, expect=(16, 16)).shape == (16, 16, 3)
        except BadSample as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "plain"])
def test_truncated_image_is_a_bad_sample(kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    data = tiff(pixels) if kind == "plain" else encode(pixels, kind)
    with pytest.raises(BadSample):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"II*\0", b"MM\0*\xff\xff\xff\xff", b"<svg/>", b"\0" * 100])
def test_no_image_is_a_bad_sample(data: bytes) -> None:
    with pytest.raises(BadSample):
        decode(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_another_size_is_a_bad_sample_naming_both(kind: str) -> None:
    with pytest.raises(BadSample, match="20 x 24 pixels, expected 24 x 24"):
        decode(encode(smooth(20, 24), kind), expect=(24, 24))


def test_pixel_bomb_is_refused_from_its_header() -> None:
    bomb = bytearray(encode(smooth(8, 8), "PNG"))
    bomb[16:24] = struct.pack(">II", 9000, 9000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    for data in (bytes(bomb), tiff(smooth(2, 2), t256=("I", [30000]), t257=("I", [30000]), t278=("I", [30000]))):
        with pytest.raises(BadSample, match="above the limit"):
            decode(data)
    jpeg = bytearray(encode(smooth(8, 8), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 60000, 60000)
    with pytest.raises(BadSample, match="above the limit"):
        decode(bytes(jpeg))


def test_sixteen_bit_pixels_are_refused_not_clipped() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 4000, np.uint16)).save(buffer, "PNG")
    with pytest.raises(BadSample, match="8 bits"):
        decode(buffer.getvalue())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "plain", "TIFF"])
def test_decoding_into_a_buffer_equals_decoding(kind: str) -> None:
    pixels = smooth(24, 30)
    data = tiff(pixels, rows=7) if kind == "plain" else encode(pixels, kind)
    chunk = np.zeros((3, 24, 30, 3), np.uint8)
    decode(data, out_HWC=chunk[1])
    assert np.array_equal(chunk[1], decode(data)) and not chunk[0].any() and not chunk[2].any()
    with pytest.raises(BadSample, match="expected 24 x 24"):
        decode(data, out_HWC=np.zeros((24, 24, 3), np.uint8))
