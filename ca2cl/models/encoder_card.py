"""``card.json``: metadata of a saved encoder."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Gt, Interval, Len

from ca2cl.common.arch_names import canonical_arch
from ca2cl.common.files import replacing
from ca2cl.common.records import Count, Number, json_line, read_record
from ca2cl.config import Pooling

ENCODER_PATH = "encoder"  # where the two files lie in a run folder and among a run's artifacts
WEIGHTS_NAME = "encoder.safetensors"
CARD_NAME = "card.json"
SCHEMA_VERSION = 1
_LARGEST = 8192  # side in pixels, or features: beyond it a card would only ask for memory
_Size = Annotated[int, Interval(ge=1, le=_LARGEST)]
AGAIN = "export the encoder again"


@dataclass(frozen=True, kw_only=True)
class EncoderCard:
    """Metadata needed to use an encoder, and its provenance."""

    __pydantic_config__ = {"allow_inf_nan": False}

    arch: str
    """Name that ``build_encoder`` takes. It also says whose names the weights have: torchvision's for a ResNet, timm's
    for ``timm:NAME``."""
    feature_dim: _Size
    input_size: _Size
    """Side in pixels of the tiles it was trained on."""
    mean: Annotated[tuple[Number, ...], Len(3, 3)]
    std: Annotated[tuple[Annotated[Number, Gt(0)], ...], Len(3, 3)]
    pooling: Pooling = "default"
    """Pooling of its features over positions, as ``model.pooling``."""
    mpp: Annotated[Number, Gt(0)] | None = None
    """Micrometres a pixel of the tiles that the weights are for, where their source states it."""
    manifest_digest: str | None = None
    """Identity of the tiles it was trained on."""
    earlier_manifests: tuple[str, ...] = ()
    """Identities of the tiles that the weights it started from were trained on."""
    classes: tuple[str, ...] = ()
    predicts: tuple[str, ...] = ()
    """Classes of the head ``fc`` in the order of its rows, where the weights have one: then it is a classifier too."""
    config_digest: str | None = None
    commit: str | None = None
    step: Count = 0
    """Optimizer steps of training."""
    weights: str | None = None
    """Which weights of the training these are: last, or ``ema DECAY``, their moving average. None: not known."""
    metrics: dict[str, Number | None] = field(default_factory=dict)
    """Last numbers of the journal."""
    source_run_id: str | None = None
    start: str | None = None
    """Where the weights come from that it, or the encoder that it was trained from, began with; none: random."""
    start_layout: str | None = None
    """How the tensors lay in that file: the layout's name, and what was taken of it."""
    start_tensors: Count | None = None
    """Tensors that were read from it."""
    start_sha256: str | None = None
    """Of that file."""
    licence: str | None = None
    """Licence of the weights that it began with, by the source's own name, with a link where there is one."""
    licence_text: str | None = None
    """Text of that licence, where the source has it."""
    origin: str | None = None
    """What it was imported from, if ca2cl did not train it here."""
    origin_sha256: str | None = None
    """Of the file that it was imported from, or of the weights where there was no one file."""
    origin_run_id: str | None = None
    """Run that trained it, if the source of the import names one."""
    schema_version: Annotated[int, Ge(1)] = SCHEMA_VERSION

    def __post_init__(self) -> None:
        from ca2cl.models.backbone import is_arch  # with torch, which takes seconds

        if not is_arch(self.arch):
            raise ValueError(f"arch is {self.arch!r:.100}, which is no architecture that this version knows")
        object.__setattr__(self, "arch", canonical_arch(self.arch))

    @property
    def manifests(self) -> tuple[str, ...]:
        """Identities of all tiles that had a part in these weights, as far as known."""
        return (*self.earlier_manifests, *([self.manifest_digest] if self.manifest_digest else []))


def read_card(path: str | Path) -> EncoderCard:
    """Read and check a card.

    Raises:
        InputError: missing, not JSON, of a newer schema, fields missing or of the wrong form.
    """
    absent = f"no card here; give a folder with {WEIGHTS_NAME} and {CARD_NAME}"
    return read_record(Path(path), EncoderCard, AGAIN, newest=SCHEMA_VERSION, absent=absent)


def write_card(path: Path, card: EncoderCard) -> None:
    """Write a card, whole or not at all."""
    with replacing(path) as file:
        file.write(json_line(asdict(card)))
