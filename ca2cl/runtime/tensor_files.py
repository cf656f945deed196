"""Safetensors files, written and read one tensor at a time.

A checkpoint may be larger than the memory of a process: under ``run.fsdp`` no process holds the whole optimizer state.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_NAMES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Names of types, in the order in which safetensors' own writer sorts tensors."""
_NOT_NUMPY = "BF16"


class Whole(NamedTuple):
    """A tensor that ranks may hold in parts, put together when it is needed.

    Attributes:
        shape: of the whole tensor.
        dtype: its type.
        gather: makes the whole tensor. Every rank calls it, in the same order.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    gather: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Whole:
        """A tensor that every rank has."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)


class Part(NamedTuple):
    """A tensor in a file, read when it is needed.

    Attributes:
        shape: of the whole tensor.
        read: its rows from the first to the one before the second, or all of it.
    """

    shape: tuple[int, ...]
    read: Callable[..., Tensor]


def write_tensors(
    file: BinaryIO | None, tensors: Mapping[str, Whole], metadata: Mapping[str, str] | None = None
) -> str:
    """Write a safetensors file, byte for byte as ``safetensors.torch.save_file`` does.

    Args:
        file: to write to; None on the ranks that only take part in gathering.
        tensors: by name, the same on every rank. One of them is in memory at a time.
        metadata: words for the file's head.

    Returns:
        SHA-256 of the file; without a file of nothing.

    Raises:
        OSError: it cannot be written.
    """
    order, digest = list(_NAMES), hashlib.sha256()
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    if file is not None:
        _write(file, _header(names, tensors, metadata), digest)
    for name in names:
        value = tensors[name].gather()
        if file is not None:
            flat = value.detach().cpu().contiguous().reshape(-1)
            _write(file, flat.view(torch.uint8).numpy().data, digest)
        del value
    return digest.hexdigest()


def _header(names: list[str], tensors: Mapping[str, Whole], metadata: Mapping[str, str] | None) -> bytes:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    start = 0
    for name in names:
        shape, dtype, _ = tensors[name]
        stop = start + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(file: BinaryIO, data: Any, digest: Any) -> None:
    file.write(data)
    digest.update(data)


@contextmanager
def reading_tensors(path: Path) -> Iterator[dict[str, Part]]:
    """The tensors of a safetensors file, which can be read inside this block.

    Raises:
        OSError, SafetensorError: it cannot be opened, or is damaged.
    """
    # NumPy's reader copies what it is asked for. torch's maps the whole file as memory of this process, which counts
    # towards limits (ulimit -d).
    with safe_open(path, framework="np") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - it is no mapping
        if _NOT_NUMPY not in kinds.values():
            yield {name: _part(file.get_slice(name)) for name in kinds}
            return
    with safe_open(path, framework="pt") as file:
        yield {name: _part(file.get_slice(name)) for name in kinds}


def _part(piece: Any) -> Part:
    shape, kind = tuple(piece.get_shape()), piece.get_dtype()
    dtype = next((dtype for dtype, name in _NAMES.items() if name == kind), None)
    if dtype is None:
        raise SafetensorError(f"holds a tensor of type {kind}")

    def read(start: int = 0, stop: int | None = None) -> Tensor:
        rows = range(*slice(start, stop).indices(shape[0])) if shape else range(1)
        if not len(rows) or 0 in shape:  # which safetensors refuses to slice
            return torch.empty((len(rows), *shape[1:]), dtype=dtype)
        return torch.as_tensor(piece[rows.start : rows.stop] if shape else piece[...])

    return Part(shape, read)
