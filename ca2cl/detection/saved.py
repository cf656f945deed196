"""A saved detector of either engine: a folder of weights in safetensors, and a card in JSON of what they mean."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ca2cl.data.atomic import write_atomic
from ca2cl.detection.engine import Head
from ca2cl.errors import InputError
from ca2cl.model.norm import Norm

WEIGHTS, CARD = "detector.safetensors", "detector.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class DetectorCard:
    """What a saved detector's weights mean."""

    head: Head
    arch: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    test_side: int
    longest_side: int
    norm: Norm
    """Of body and pyramid; with frozen the pyramid has none."""
    engine: str
    engine_version: str
    schema_version: int = SCHEMA_VERSION


def write_detector(folder: Path, card: DetectorCard, state: Mapping[str, Tensor]) -> None:
    """Write a detector into a folder that does not exist yet."""
    folder.mkdir(parents=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    write_atomic(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_atomic(folder / CARD, (json.dumps(asdict(card), indent=1) + "\n").encode())


def read_card(folder: Path) -> DetectorCard:
    """The card of a detector.

    Raises:
        InputError: nothing there, damaged, or written by a newer version.
    """
    try:
        held: dict[str, Any] = json.loads((folder / CARD).read_text(encoding="utf-8"))
        if held["schema_version"] > SCHEMA_VERSION:
            raise InputError(f"{folder}: written by a newer ca2cl; upgrade this one")
        held = {name: tuple(value) if isinstance(value, list) else value for name, value in held.items()}
        return DetectorCard(**held)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(_damaged(folder, error)) from None


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a detector by name.

    Raises:
        InputError: not there, or damaged.
    """
    try:
        return dict(load_file(folder / WEIGHTS))
    except (OSError, SafetensorError) as error:
        raise InputError(_damaged(folder, error)) from None


def fill(network: nn.Module, state: Mapping[str, Tensor], folder: Path) -> None:
    """Give a network all of a detector's tensors.

    Raises:
        InputError: they are not this network's.
    """
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise InputError(_damaged(folder, error)) from None


def _damaged(folder: Path, error: Exception) -> str:
    return f"{folder}: no detector, or damaged ({' '.join(str(error).split())[:200]}); train it again"
