"""Save and load an encoder: ``encoder.safetensors`` and ``card.json``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ca2cl.common.files import replacing
from ca2cl.common.records import json_line, parse_record
from ca2cl.config import Pooling
from ca2cl.errors import InputError
from ca2cl.models.backbone import Backbone, build_encoder, check_trusted
from ca2cl.models.encoder_card import (
    AGAIN,
    CARD_NAME,
    ENCODER_PATH,
    WEIGHTS_NAME,
    EncoderCard,
    read_card,
    write_card,
)
from ca2cl.runtime.tensor_files import Whole, write_tensors

__all__ = ["CARD_NAME", "ENCODER_PATH", "WEIGHTS_NAME", "EncoderCard", "read_card", "write_card"]

_SHOWN = 5
# BatchNorm's step counter, which some exporters leave out and inference never reads
_COUNTER = "num_batches_tracked"


def save_encoder(folder: str | Path, encoder_state: Mapping[str, Tensor | Whole], card: EncoderCard) -> Path:
    """Write an encoder's weights, then its card; each file appears whole or not at all. Returns the folder.

    Args:
        encoder_state: its tensors; ``Whole`` ones are gathered one after another, together with the other ranks.

    Raises:
        OSError: it cannot be written.
        InputError: the card could not be read again.
    """
    target = Path(folder)
    parse_record(json_line(asdict(card)), EncoderCard, target / CARD_NAME, AGAIN)
    target.mkdir(parents=True, exist_ok=True)
    state = {name: Whole.of(value) if isinstance(value, Tensor) else value for name, value in encoder_state.items()}
    with replacing(target / WEIGHTS_NAME) as file:
        write_tensors(file, state, metadata={"format": "pt"})
    write_card(target / CARD_NAME, card)
    return target


def load_encoder(folder: str | Path, arch: str | None = None) -> tuple[Backbone, EncoderCard]:
    """The encoder that ``save_encoder`` wrote, in eval mode on the CPU, and its card.

    Args:
        arch: what the user asked for; a builder outside this package is imported where it is named here.

    Raises:
        InputError: a file is missing or damaged, or the weights are not the card's architecture.
    """
    card = read_card(Path(folder) / CARD_NAME)
    path = Path(folder) / WEIGHTS_NAME
    check_trusted(card.arch, str(path), arch)
    encoder = make_encoder(read_weights(path), card.arch, str(path), card.input_size, card.pooling)
    if card.feature_dim != encoder.feature_dim:
        raise InputError(
            f"{Path(folder) / CARD_NAME}: damaged card (feature_dim is {card.feature_dim}, a {card.arch} has "
            f"{encoder.feature_dim}); export the encoder again"
        )
    return encoder, card


class Head(NamedTuple):
    """Linear layer behind the features: ``weight`` (K, D) and ``bias`` (K,)."""

    weight: Tensor
    bias: Tensor


def read_head(folder: str | Path, card: EncoderCard) -> Head | None:
    """The head ``fc`` that lies with an encoder's weights; None if there is none.

    Raises:
        InputError: it has not the classes that ``card`` names.
    """
    if not card.predicts:
        return None
    path = Path(folder) / WEIGHTS_NAME
    try:
        with safe_open(path, "pt") as file:
            head = Head(file.get_tensor("fc.weight"), file.get_tensor("fc.bias"))
    except SafetensorError:  # it names classes and has no such tensors
        return None
    classes = len(card.predicts)
    if head.weight.shape != (classes, card.feature_dim) or head.bias.shape != (classes,):
        raise InputError(f"{path}: damaged, its head has not the {classes} classes of {CARD_NAME}; {AGAIN}")
    return head


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        InputError: missing or damaged.
    """
    try:
        return dict(load_file(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give an encoder's {WEIGHTS_NAME}") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); export it again") from None


def make_encoder(
    state: Mapping[str, Tensor], arch: str, source: str, image_size: int = 224, pooling: Pooling = "default"
) -> Backbone:
    """An encoder of ``arch`` in eval mode with exactly the tensors of ``state``; a classifier is left out.

    Args:
        source: where the tensors are from, for messages.
        image_size: side of the tiles that it will see; position embeddings for another one are resampled.
        pooling: see ``Backbone``.

    Raises:
        InputError: a backbone tensor is missing, left over, or of another shape.
    """
    encoder = build_encoder(arch, image_size=image_size, pooling=pooling)
    fill(encoder, state, source)
    encoder.eval()
    return encoder


def fill(encoder: Backbone, state: Mapping[str, Tensor], source: str) -> int:
    """Load exactly the tensors of ``state``, less a classifier's; returns their number. The arguments and errors are
    those of ``make_encoder``."""
    wanted = encoder.state_dict()
    given = {name: tensor for name, tensor in state.items() if name in wanted or not name.startswith(encoder.heads)}
    given = dict(encoder.fitted(given))
    missing = [name for name in wanted if name not in given and not name.endswith(_COUNTER)]
    unexpected = [name for name in given if name not in wanted]
    shapes = [name for name in wanted if name in given and given[name].shape != wanted[name].shape]
    faults = [
        f"{len(names)} {what} ({_first(names)})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if faults:
        fit = len(wanted.keys() & given.keys()) - len(shapes)
        raise InputError(
            f"{source}: not a {encoder.arch}: {fit} of {len(wanted)} backbone tensors fit, {', '.join(faults)}; "
            "give the architecture that it was trained with"
        )
    encoder.load_state_dict({**wanted, **given})
    return len(given)


def _first(names: Sequence[str]) -> str:
    return f"first {', '.join(names[:_SHOWN])}"


def weights_digest(encoder: nn.Module, mean: Sequence[float], std: Sequence[float]) -> str:
    """SHA-256 of what makes a tile's vector: the tensors by name, and the normalisation in front of them."""
    digest = hashlib.sha256(repr((list(mean), list(std))).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"\0{name} {tuple(tensor.shape)} {tensor.dtype}\0".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
