"""A saved detector of either engine: a folder of weights in safetensors, and a card in JSON of what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ca2cl.common.files import write_atomic, write_record
from ca2cl.common.records import is_number, is_text, is_whole, parse_json
from ca2cl.detection.engines.base import Head
from ca2cl.errors import InputError
from ca2cl.models.batch_norm import Norm
from ca2cl.models.resnet import ARCHITECTURES

WEIGHTS, CARD = "detector.safetensors", "detector.json"
SCHEMA_VERSION = 1
KEPT = "free some space and start again: finished detectors and the last checkpoint are kept"
_MOST_CLASSES, _LONGEST_SIDE = 10_000, 2**15  # beyond these a card would only ask for memory


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
    write_atomic(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}), KEPT)
    write_record(folder / CARD, asdict(card), KEPT)


def read_card(folder: Path) -> DetectorCard:
    """The card of a detector.

    Raises:
        InputError: nothing there, damaged, or written by a newer version.
    """
    try:
        held: dict[str, Any] = parse_json((folder / CARD).read_text(encoding="utf-8"))
        if is_whole(held["schema_version"], SCHEMA_VERSION + 1):
            raise InputError(f"{folder}: written by a newer ca2cl; upgrade this one")
        held = {name: tuple(value) if isinstance(value, list) else value for name, value in held.items()}
        card = DetectorCard(**held)
        _check(card)
        return card
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(_damaged(folder, error)) from None


def _check(card: DetectorCard) -> None:
    """ValueError that names the field whose value is of the wrong kind."""
    named = isinstance(card.classes, tuple) and all(map(is_text, card.classes))
    holds = {
        "schema_version": is_whole(card.schema_version, 1, SCHEMA_VERSION),
        "head": card.head in get_args(Head),
        "norm": card.norm in get_args(Norm),
        "arch": card.arch in ARCHITECTURES,
        "classes": named and 0 < len(card.classes) <= _MOST_CLASSES and len(set(card.classes)) == len(card.classes),
        "mean": _three(card.mean),
        "std": _three(card.std) and min(card.std) > 0,
        "test_side": is_whole(card.test_side, 1, _LONGEST_SIDE),
        "longest_side": is_whole(card.longest_side, 1, _LONGEST_SIDE),
        "engine": is_text(card.engine),
        "engine_version": is_text(card.engine_version),
    }
    wrong = next((name for name, good in holds.items() if not good), None)
    if wrong:
        raise ValueError(f"{wrong} is {getattr(card, wrong)!r:.100}")


def _three(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and all(map(is_number, value))


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
