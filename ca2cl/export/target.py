"""Protocol of an export format, and helpers that formats share.

Shapes: B tiles, S side of the input, D features.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ca2cl.models.backbone import Backbone
from ca2cl.models.encoder_io import EncoderCard
from ca2cl.models.preprocess import normalise_

Features = Callable[[Tensor], Tensor]
"""Tiles (B, 3, S, S), RGB in [0, 1], not normalised → features (B, D)."""

EXTRA = 'pip install "ca2cl[export]"'


class Target:
    """One kind of file. A subclass need not define ``own``."""

    name: str
    """As given to ``--to``."""
    package: str
    """Whose own means ``native`` reads the file by."""
    suffixes: tuple[str, ...] = ()
    """That OUT may have; none for a folder."""
    tolerance: float = 1e-5
    """Largest difference of its features from the encoder's, relative to the largest feature."""

    def build(self, encoder: Backbone, card: EncoderCard, out: Path) -> dict[str, bytes]:
        """Files to write: names relative to the folder that OUT is in → content, OUT's own last."""
        raise NotImplementedError

    def native(self, path: Path, card: EncoderCard) -> Features:
        """Read the file as its users will.

        Raises:
            MissingPackage: ``package`` is not installed.
        """
        raise NotImplementedError

    def own(self, path: Path, card: EncoderCard) -> Features | None:
        """Read the file without ``package``; None where that cannot be done."""
        return None

    def snippet(self, path: Path, card: EncoderCard) -> str:
        """Three lines of Python that make ``model`` from the file."""
        raise NotImplementedError


def plain_state(encoder: Backbone) -> dict[str, Tensor]:
    """The encoder's tensors under its own names, on the CPU, in a dictionary without attributes."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}


def torch_bytes(content: Mapping[str, Any]) -> bytes:
    """A ``.pth`` of tensors and plain values, which ``torch.load(weights_only=True)`` reads."""
    out = io.BytesIO()  # torch reports a full disk as a RuntimeError without a name; we write the bytes ourselves
    torch.save(dict(content), out)
    return out.getvalue()


def behind_normalisation(model: Callable[[Tensor], Tensor], card: EncoderCard) -> Features:
    """``model`` behind the normalisation that the card states."""

    def features(tiles_BCHW: Tensor) -> Tensor:
        return model(normalise_(tiles_BCHW.clone(), card.mean, card.std))

    return features
