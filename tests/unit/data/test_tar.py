"""Tars are those of the standard library, byte for byte."""

from __future__ import annotations

import hashlib
import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ca2cl.data.shards.tar import TarWriter, header


def by_tarfile(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.PAX_FORMAT)


@given(st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), max_size=120), st.integers(0, 2**36))
def test_a_header_is_tarfiles(name: str, size: int) -> None:
    assert header(name, size) == by_tarfile(name, size)


@pytest.mark.parametrize("name", ["a.jpg", "x" * 100, "x" * 101, "ä.jpg", "~%7E.json"])
@pytest.mark.parametrize("size", [0, 1, 8**11 - 1, 8**11])
def test_a_header_at_its_limits_is_tarfiles(name: str, size: int) -> None:
    assert header(name, size) == by_tarfile(name, size)


def test_a_tar_is_tarfiles_and_offsets_and_digest_fit() -> None:
    samples = [(f"key{n}", {"jpg": bytes([n]) * (511 + n), "cls": str(n).encode(), "json": b"{}"}) for n in range(4)]
    ours, theirs = io.BytesIO(), io.BytesIO()
    tar = TarWriter(ours)
    offsets = [tar.add(key, parts) for key, parts in samples]
    tar.close()
    with tarfile.open(fileobj=theirs, mode="w", format=tarfile.PAX_FORMAT) as other:
        for key, parts in samples:
            for ext, data in parts.items():
                member = tarfile.TarInfo(f"{key}.{ext}")
                member.size = len(data)
                other.addfile(member, io.BytesIO(data))
    written = ours.getvalue()
    assert written == theirs.getvalue()
    assert (tar.length, tar.sha256.hexdigest()) == (len(written), hashlib.sha256(written).hexdigest())
    for offset, (_, parts) in zip(offsets, samples, strict=True):
        assert written[offset : offset + len(parts["jpg"])] == parts["jpg"]
