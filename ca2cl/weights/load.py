"""Load an encoder from a file of weights, every tensor accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from ca2cl.common.arch_names import TIMM
from ca2cl.common.files import file_digest
from ca2cl.common.records import load_tensors
from ca2cl.errors import InputError
from ca2cl.models.backbone import Backbone, build_encoder, outline
from ca2cl.models.encoder_io import fill, read_weights
from ca2cl.weights.find import WeightsFile
from ca2cl.weights.layouts import left_out, take

DEFAULT_SIZE = 224
_MADE_ANEW = ("pos_embed", "cls_token")
"""Tensors that are computed from a file's: resampled, or moved into one another."""
_POSITIONS, _CLASS = "pos_embed", "cls_token"


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where weights come from.

    Attributes:
        source: name of the file, run or registered model, without secrets.
        layout: how the tensors lay in it.
        tensors: number that were read.
        sha256: of the file.
    """

    source: str
    layout: str
    tensors: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.source}, {self.layout}, {self.tensors} tensors, sha256 {self.sha256}"


def load_weights(file: WeightsFile, arch: str) -> tuple[Backbone, int, Start]:
    """An encoder in eval mode with exactly the tensors of a file, the side of its tiles, and its start.

    Args:
        arch: as ``model.arch``.

    Raises:
        InputError: not plain tensors, or a tensor of the body or of the file without its counterpart; names five.
    """
    source = str(file.path) if file.source == str(file.path.resolve()) else file.source
    body = outline(arch, image_size=_any_size(file, arch))
    taken = take(read_tensors(file.path), body.state_dict(), source)
    size = file.stated.input_size or _size_of(taken.state, body) or _any_size(file, arch)
    encoder = build_encoder(arch, image_size=size)
    state = {name: one for name, one in taken.state.items() if not name.startswith(encoder.heads)}
    tensors = fill(encoder, _renamed(encoder, state), source)
    start = Start(source=file.source, layout=taken.layout, tensors=tensors, sha256=file_digest(file.path))
    return encoder.eval(), size, start


def read_tensors(path: Path) -> Any:
    """Content of a file of tensors; nothing in it is executed.

    Raises:
        InputError: anything but plain tensors in it, or damaged.
    """
    if path.suffix == ".safetensors":
        return read_weights(path)
    try:
        return load_tensors(path)
    except ValueError as error:
        raise InputError(
            f"encoder {str(path)!r}: not a file of plain tensors ({error}); where it was made, write the weights alone "
            "by torch.save(model.state_dict(), FILE) or as safetensors"
        ) from None


def _renamed(encoder: Backbone, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """``state`` under the body's own names. A tensor that the renaming drops comes back, to be named as left over."""
    own = encoder.state_dict()
    if state.keys() <= own.keys():
        return state
    renamed = dict(encoder.renamed(state))
    kept = [one for one in renamed.values() if one.numel()]
    lost = {
        name: one
        for name, one in state.items()
        if name not in renamed and name not in _MADE_ANEW and not left_out(name, one) and not _is_part(one, kept)
    }
    return {**{name: one for name, one in renamed.items() if name in own or not left_out(name, one)}, **lost}


def _is_part(tensor: Tensor, kept: list[Tensor]) -> bool:
    """Whether one of ``kept`` lies in the memory of ``tensor``: it was renamed, reshaped or cut."""
    first = tensor.data_ptr()
    return any(first <= one.data_ptr() < first + tensor.numel() * tensor.element_size() for one in kept)


def _any_size(file: WeightsFile, arch: str) -> int:
    """A side that the architecture takes: as stated, or 224 pixels, or that of timm's own configuration."""
    if file.stated.input_size:
        return file.stated.input_size
    if arch.startswith(TIMM):
        from ca2cl.models.timm.spelling import settings_of, split_arch

        settings, patch = settings_of(arch), split_arch(arch)[1].get("patch_size", 1)
        if settings.fixed_input_size:
            return int(max(1, settings.input_size[1] // patch) * patch)
    return DEFAULT_SIZE


def _size_of(state: Mapping[str, Tensor], body: Backbone) -> int | None:
    """Side in pixels of the tiles that absolute position embeddings are for."""
    positions = state.get(_POSITIONS)
    if positions is None or positions.ndim != 3 or body.patch_size == 1:
        return None
    for prefix in (1, 0) if _CLASS in state else (0,):
        side = isqrt(positions.shape[1] - prefix)
        if side * side == positions.shape[1] - prefix:
            return side * body.patch_size
    return None
