"""Linear classifier of frozen features, and its file.

Legend: N tiles, D features, K classes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from annotated_types import Ge, Gt, Len
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ca2cl.common.files import write_atomic
from ca2cl.common.records import Count, Number, json_line, parse_record
from ca2cl.config import Pooling
from ca2cl.errors import InputError
from ca2cl.evaluation.features import FloatArray, scaled

SUFFIX = "-classifier.safetensors"
"""End of the file's name; what stands before it is the name of the probe's JSON."""
SCHEMA_VERSION = 1
_METADATA = "ca2cl"
_REMEDY = "probe again"


class LinearHead(NamedTuple):
    """Softmax of ``weight f + bias`` of the features ``f``, which are first taken less a mean and to unit length."""

    weight_KD: FloatArray
    bias_K: FloatArray
    mean_D: FloatArray | None = None
    """None takes the features as they are."""

    def probabilities(self, values_ND: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Of the classes, (N, K)."""
        features_ND = values_ND if self.mean_D is None else scaled(values_ND, self.mean_D)
        logits_NK = features_ND.astype(np.float64) @ self.weight_KD.T.astype(np.float64) + self.bias_K
        odds_NK = np.exp(logits_NK - logits_NK.max(axis=1, keepdims=True))
        return np.asarray(odds_NK / odds_NK.sum(axis=1, keepdims=True))

    def cooled(self, temperature: float) -> LinearHead:
        """The same classifier with all logits divided by a temperature."""
        return self._replace(weight_KD=self.weight_KD / temperature, bias_K=self.bias_K / temperature)


@dataclass(frozen=True, kw_only=True)
class HeadCard:
    """What a probe's classifier is, and of which features."""

    classes: Annotated[tuple[str, ...], Len(2)]
    """In the order of its rows."""
    encoder: str
    """Name of the encoder, as verbs take it."""
    source_run_id: str | None
    weights: str
    """Digest of the encoder's weights and normalisation (``weights_digest``)."""
    image_size: Annotated[int, Ge(1)]
    """Side in pixels of the encoder's input."""
    pooling: Pooling
    """Tokens of a ViT that the features were made of."""
    classifier: str
    """Its row in the probe's table."""
    labels: Annotated[Number, Gt(0)]
    """Label budget."""
    labelled: Count
    """Tiles that it was fitted on, of the first draw."""
    setting: dict[str, Number]
    tile_size: Annotated[tuple[int, ...], Len(2, 2)]
    """Height and width in pixels of the tiles."""
    train_manifest_digest: str
    schema_version: Annotated[int, Ge(1)] = SCHEMA_VERSION


def write_head(path: Path, head: LinearHead, card: HeadCard, remedy: str) -> None:
    """Write a classifier of centred features.

    Raises:
        InputError: it cannot be written.
    """
    assert head.mean_D is not None
    tensors: dict[str, Any] = {
        name: np.ascontiguousarray(value, np.float64)
        for name, value in (("weight", head.weight_KD), ("bias", head.bias_K))
    }
    tensors["mean"] = np.ascontiguousarray(head.mean_D)
    write_atomic(path, save(tensors, {_METADATA: json_line(asdict(card)).decode().strip()}), remedy)


def read_head(path: Path) -> tuple[LinearHead, HeadCard]:
    """The classifier in a file.

    Raises:
        InputError: it is missing, damaged or of a newer version.
    """
    try:
        with safe_open(path, "numpy") as file:
            text = (file.metadata() or {}).get(_METADATA, "{}")
            weight_KD, bias_K, mean_D = (file.get_tensor(name) for name in ("weight", "bias", "mean"))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a probe's classifier ({error}); {_REMEDY}") from None
    card = parse_record(text, HeadCard, path, _REMEDY, newest=SCHEMA_VERSION)
    classes = len(card.classes)
    if weight_KD.shape != (classes, *mean_D.shape) or bias_K.shape != (classes,) or mean_D.ndim != 1:
        raise InputError(f"{path}: damaged, its tensors do not fit {classes} classes; {_REMEDY}")
    return LinearHead(weight_KD, bias_K, mean_D), card
