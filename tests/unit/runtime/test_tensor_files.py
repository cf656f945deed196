"""Safetensors files one tensor at a time: the bytes of safetensors' own writer, and any rows of what was written."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save, save_file
from torch import Tensor

from ca2cl.runtime.tensor_files import Whole, reading_tensors, write_tensors


def tensors(*, half: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    found = {
        "weight": torch.randn(5, 3, 4, 4).to(memory_format=torch.channels_last), "ü/a": torch.randn(7),
        "count": torch.tensor(5), "empty": torch.zeros(0, 3), "double": torch.randn(3, 2, dtype=torch.float64),
        "bytes": torch.arange(5, dtype=torch.uint8), "flags": torch.tensor([True, False]),
        "ints": torch.arange(4, dtype=torch.int32), "fp16": torch.randn(4).half(),
    }  # fmt: skip
    return {**found, "bf16": torch.randn(3, 2).bfloat16()} if half else found


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("words", [None, {"format": "pt"}])
def test_the_bytes_are_those_of_safetensors_own_writer(half: bool, words: dict[str, str] | None) -> None:
    given, file = tensors(half=half), io.BytesIO()
    digest = write_tensors(file, {name: Whole.of(value) for name, value in given.items()}, words)
    expected = save({name: value.contiguous() for name, value in given.items()}, words)
    assert file.getvalue() == expected
    assert digest == hashlib.sha256(expected).hexdigest()


def test_every_rank_gathers_in_the_same_order_one_tensor_after_another() -> None:
    orders: list[list[str]] = []
    for file, names in ((io.BytesIO(), ["b", "a", "c"]), (None, ["c", "b", "a"])):
        order: list[str] = []

        def gather(name: str, order: list[str] = order) -> Tensor:
            order.append(name)
            return torch.zeros(2)

        write_tensors(file, {name: Whole((2,), torch.float32, lambda name=name: gather(name)) for name in names})  # type: ignore[misc]
        orders.append(order)
    assert orders == [["a", "b", "c"]] * 2


@pytest.mark.parametrize("half", [False, True])
def test_any_rows_are_read(half: bool, tmp_path: Path) -> None:
    given = tensors(half=half)
    save_file({name: value.contiguous() for name, value in given.items()}, tmp_path / "file")
    with reading_tensors(tmp_path / "file") as parts:
        assert parts.keys() == given.keys()
        for name, value in given.items():
            assert parts[name].shape == value.shape
            read = parts[name].read()
            assert read.dtype == value.dtype and torch.equal(read, value), name
            for start, stop in [(0, 1), (1, 3), (2, 2), (3, 9), (9, 12)] if value.ndim else []:
                rows = parts[name].read(start, stop)
                assert rows.dtype == value.dtype and torch.equal(rows, value[start:stop]), (name, start, stop)


def test_an_unknown_type_is_a_damaged_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "file")
    with pytest.raises(SafetensorError, match="type C64"), reading_tensors(tmp_path / "file"):
        pass
