"""An encoder as files: ``encoder.safetensors`` (the backbone's own key names) and ``card.json`` beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ca2cl.common.files import replacing
from ca2cl.common.records import is_number, is_text, is_whole, json_line, parse_json
from ca2cl.errors import InputError
from ca2cl.models.backbone import Backbone, build_encoder, check_trusted, is_arch

ENCODER_PATH = "encoder"  # where the two files lie in a run folder and among a run's artifacts
WEIGHTS_NAME = "encoder.safetensors"
CARD_NAME = "card.json"
SCHEMA_VERSION = 1
_LARGEST = 8192  # side in pixels, or features: beyond it a card would only ask for memory
_OPTIONAL_TEXTS = (
    "manifest_digest", "config_digest", "commit", "source_run_id", "origin", "origin_sha256", "origin_run_id",
)  # fmt: skip
# BatchNorm's step counter, which some exporters leave out and inference never reads
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True, kw_only=True)
class EncoderCard:
    """What must be known of an encoder to use it, and where it comes from."""

    arch: str
    """Name that ``build_encoder`` takes. It also says whose names the weights have: torchvision's for a ResNet, timm's
    for ``timm/NAME``."""
    feature_dim: int
    input_size: int
    """Side in pixels of the tiles it was trained on."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    manifest_digest: str | None = None
    """Identity of the tiles it was trained on."""
    earlier_manifests: tuple[str, ...] = ()
    """Identities of the tiles that the weights it started from were trained on."""
    classes: tuple[str, ...] = ()
    predicts: tuple[str, ...] = ()
    """Classes of the head ``fc`` in the order of its rows, where the weights have one: then it is a classifier too."""
    config_digest: str | None = None
    commit: str | None = None
    step: int = 0
    """Optimizer steps of training."""
    metrics: dict[str, float | None] = field(default_factory=dict)
    """Last numbers of the journal."""
    source_run_id: str | None = None
    origin: str | None = None
    """What it was imported from, if ca2cl did not train it here."""
    origin_sha256: str | None = None
    """Of the file that it was imported from, or of the weights where there was no one file."""
    origin_run_id: str | None = None
    """Run that trained it, as far as what it was imported from told."""
    schema_version: int = SCHEMA_VERSION

    @property
    def manifests(self) -> tuple[str, ...]:
        """Identities of all tiles that had a part in these weights, as far as known."""
        return (*self.earlier_manifests, *([self.manifest_digest] if self.manifest_digest else []))


def read_card(path: str | Path) -> EncoderCard:
    """Read and check a card.

    Raises:
        InputError: missing, not JSON, of a newer schema, fields missing or of the wrong form.
    """
    try:
        raw = parse_json(Path(path).read_text(encoding="utf-8"))
        version = raw["schema_version"]
        if not is_whole(version, 1):
            raise ValueError(f"schema_version is {version!r:.100}")
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no card here; give a folder with {WEIGHTS_NAME} and {CARD_NAME}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a card of ca2cl ({error!r}); export the encoder again") from None
    if version > SCHEMA_VERSION:
        raise InputError(f"{path}: schema {version!r} is newer than this version's {SCHEMA_VERSION}; upgrade ca2cl")
    known = {f.name for f in fields(EncoderCard)}
    try:
        card = EncoderCard(**{name: _frozen(value) for name, value in raw.items() if name in known})
        _check(card)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: damaged card ({error}); export the encoder again") from None
    return card


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check(card: EncoderCard) -> None:
    if not is_arch(card.arch):
        raise ValueError(f"arch is {card.arch!r:.100}, which is no architecture that this version knows")
    for name in ("feature_dim", "input_size"):
        if not is_whole(getattr(card, name), 1, _LARGEST):
            raise ValueError(f"{name} is {getattr(card, name)!r:.100}, not a number from 1 to {_LARGEST}")
    for name in ("mean", "std"):
        value = getattr(card, name)
        if not isinstance(value, tuple) or len(value) != 3 or not all(map(is_number, value)):
            raise ValueError(f"{name} is {value!r:.100}, not three numbers")
    if min(card.std) <= 0:
        raise ValueError(f"std is {card.std!r}, not three positive numbers")
    _check_facts(card)


def _check_facts(card: EncoderCard) -> None:
    for name in ("classes", "predicts", "earlier_manifests"):
        value = getattr(card, name)
        if not isinstance(value, tuple) or not all(map(is_text, value)):
            raise ValueError(f"{name} is {value!r:.100}, not a list of names")
    for name in _OPTIONAL_TEXTS:
        value = getattr(card, name)
        if value is not None and not is_text(value):
            raise ValueError(f"{name} is {value!r:.100}, not text")
    if not is_whole(card.step):
        raise ValueError(f"step is {card.step!r:.100}, not a number of steps")
    if not isinstance(card.metrics, dict) or not all(_is_metric(value) for value in card.metrics.values()):
        raise ValueError("metrics are not numbers by name")


def _is_metric(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def save_encoder(folder: str | Path, encoder_state: Mapping[str, Tensor], card: EncoderCard) -> Path:
    """Write an encoder's weights, then its card; each file appears whole or not at all. Returns the folder.

    Raises:
        OSError: it cannot be written.
    """
    _check(card)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder_state.items()}
    with replacing(target / WEIGHTS_NAME) as file:
        file.write(save(state, metadata={"format": "pt"}))
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
