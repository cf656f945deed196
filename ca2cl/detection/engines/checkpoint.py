"""Save and load a detector: safetensors weights and a JSON card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Gt, Interval, Len
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ca2cl.common.arch_names import canonical_arch
from ca2cl.common.files import write_atomic, write_record
from ca2cl.common.records import Number, read_record
from ca2cl.detection.engines.settings import Head
from ca2cl.errors import InputError
from ca2cl.models.backbone import is_arch
from ca2cl.models.batch_norm import Norm

WEIGHTS, CARD = "detector.safetensors", "detector.json"
SCHEMA_VERSION = 2
"""1 had no ``input_size``."""
KEPT = "free some space and start again: finished detectors and the last checkpoint are kept"
_Side = Annotated[int, Interval(ge=1, le=2**15)]  # beyond that a card would only ask for memory


@dataclass(frozen=True, kw_only=True)
class DetectorCard:
    """Description of a saved detector: how its weights are to be used."""

    __pydantic_config__ = {"allow_inf_nan": False, "extra": "forbid"}

    head: Head
    arch: str
    """Of the encoder, as in its card."""
    input_size: _Side = 224
    """Side of the tiles that the encoder was trained on: its position embeddings are for it."""
    classes: Annotated[tuple[str, ...], Len(1, 10_000)]
    mean: Annotated[tuple[Number, ...], Len(3, 3)]
    std: Annotated[tuple[Annotated[Number, Gt(0)], ...], Len(3, 3)]
    test_side: _Side
    longest_side: _Side
    norm: Norm
    """Of body and pyramid; with frozen the pyramid has none."""
    engine: str
    engine_version: str
    schema_version: Annotated[int, Ge(1)] = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if not is_arch(self.arch):
            raise ValueError(f"arch is {self.arch!r:.100}, which is no architecture that this version knows")
        object.__setattr__(self, "arch", canonical_arch(self.arch))
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes is {self.classes!r:.100} and names one twice")


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
    absent = "no detector here; give a folder of one"
    return read_record(folder / CARD, DetectorCard, "train it again", newest=SCHEMA_VERSION, absent=absent)


def load_weights(folder: Path, network: nn.Module) -> None:
    """Give a network all tensors of a saved detector.

    Raises:
        InputError: they are not there, damaged, or not this network's.
    """
    try:
        network.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder}: no detector, or damaged ({reason}); train it again") from None
