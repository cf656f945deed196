"""Save and load an encoder: ``encoder.safetensors`` and ``card.json``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Gt, Interval, Len
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ca2cl.common.files import replacing
from ca2cl.common.records import Count, Number, json_line, parse_record, read_record
from ca2cl.errors import InputError
from ca2cl.models.backbone import Backbone, build_encoder, check_trusted, is_arch
from ca2cl.runtime.tensor_files import Whole, write_tensors

ENCODER_PATH = "encoder"  # where the two files lie in a run folder and among a run's artifacts
WEIGHTS_NAME = "encoder.safetensors"
CARD_NAME = "card.json"
SCHEMA_VERSION = 1
_LARGEST = 8192  # side in pixels, or features: beyond it a card would only ask for memory
_Size = Annotated[int, Interval(ge=1, le=_LARGEST)]
_AGAIN = "export the encoder again"
# BatchNorm's step counter, which some exporters leave out and inference never reads
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True, kw_only=True)
class EncoderCard:
    """Metadata needed to use an encoder, and its provenance."""

    __pydantic_config__ = {"allow_inf_nan": False}

    arch: str
    """Name that ``build_encoder`` takes. It also says whose names the weights have: torchvision's for a ResNet, timm's
    for ``timm/NAME``."""
    feature_dim: _Size
    input_size: _Size
    """Side in pixels of the tiles it was trained on."""
    mean: Annotated[tuple[Number, ...], Len(3, 3)]
    std: Annotated[tuple[Annotated[Number, Gt(0)], ...], Len(3, 3)]
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
    metrics: dict[str, Number | None] = field(default_factory=dict)
    """Last numbers of the journal."""
    source_run_id: str | None = None
    origin: str | None = None
    """What it was imported from, if ca2cl did not train it here."""
    origin_sha256: str | None = None
    """Of the file that it was imported from, or of the weights where there was no one file."""
    origin_run_id: str | None = None
    """Run that trained it, if the source of the import names one."""
    schema_version: Annotated[int, Ge(1)] = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if not is_arch(self.arch):
            raise ValueError(f"arch is {self.arch!r:.100}, which is no architecture that this version knows")

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
    return read_record(Path(path), EncoderCard, _AGAIN, newest=SCHEMA_VERSION, absent=absent)


def save_encoder(folder: str | Path, encoder_state: Mapping[str, Tensor | Whole], card: EncoderCard) -> Path:
    """Write an encoder's weights, then its card; each file appears whole or not at all. Returns the folder.

    Args:
        encoder_state: its tensors; ``Whole`` ones are gathered one after another, together with the other ranks.

    Raises:
        OSError: it cannot be written.
        InputError: the card could not be read again.
    """
    target = Path(folder)
    parse_record(json_line(asdict(card)), EncoderCard, target / CARD_NAME, _AGAIN)
    target.mkdir(parents=True, exist_ok=True)
    state = {name: Whole.of(value) if isinstance(value, Tensor) else value for name, value in encoder_state.items()}
    with replacing(target / WEIGHTS_NAME) as file:
        write_tensors(file, state, metadata={"format": "pt"})
    write_card(target / CARD_NAME, card)
    return target


def write_card(path: Path, card: EncoderCard) -> None:
    """Write a card, whole or not at all."""
    with replacing(path) as file:
        file.write(json_line(asdict(card)))


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
    encoder = make_encoder(read_weights(path), card.arch, str(path), card.input_size)
    if card.feature_dim != encoder.feature_dim:
        raise InputError(
            f"{Path(folder) / CARD_NAME}: damaged card (feature_dim is {card.feature_dim}, a {card.arch} has "
            f"{encoder.feature_dim}); export the encoder again"
        )
    return encoder, card


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


def make_encoder(state: Mapping[str, Tensor], arch: str, source: str, image_size: int = 224) -> Backbone:
    """An encoder of ``arch`` in eval mode with exactly the tensors of ``state``; a classifier is left out.

    Args:
        source: where the tensors are from, for messages.
        image_size: side of the tiles that it will see; position embeddings for another one are resampled.

    Raises:
        InputError: a backbone tensor is missing, left over, or of another shape.
    """
    encoder = build_encoder(arch, image_size=image_size)
    wanted = encoder.state_dict()
    given = {name: tensor for name, tensor in state.items() if name in wanted or not name.startswith(encoder.heads)}
    given = dict(encoder.fitted(given))
    missing = [name for name in wanted if name not in given and not name.endswith(_COUNTER)]
    unexpected = [name for name in given if name not in wanted]
    shapes = [name for name in wanted if name in given and given[name].shape != wanted[name].shape]
    faults = [
        f"{len(names)} {what} (first {names[0]})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if faults:
        fit = len(wanted.keys() & given.keys()) - len(shapes)
        raise InputError(
            f"{source}: not a {arch}: {fit} of {len(wanted)} backbone tensors fit, {', '.join(faults)}; "
            "give the architecture that it was trained with"
        )
    encoder.load_state_dict({**wanted, **given})
    encoder.eval()
    return encoder


def weights_digest(encoder: nn.Module, mean: Sequence[float], std: Sequence[float]) -> str:
    """SHA-256 of what makes a tile's vector: the tensors by name, and the normalisation in front of them."""
    digest = hashlib.sha256(repr((list(mean), list(std))).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"\0{name} {tuple(tensor.shape)} {tensor.dtype}\0".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
