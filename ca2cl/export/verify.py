"""Verify an exported file: its features must equal the encoder's.

Shapes: B tiles, S side of the input, D features.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
from torch import Tensor

from ca2cl.common.optional import MissingPackage
from ca2cl.errors import InputError
from ca2cl.export.target import Features, Target, behind_normalisation
from ca2cl.registry.resolve import ResolvedEncoder


class Trial:
    """A few tiles and an encoder's features of them.

    Raises:
        InputError: the features are not finite.
    """

    def __init__(self, found: ResolvedEncoder) -> None:
        self._card = found.card
        self._tiles_BCHW = sample_tiles(found.card.input_size)
        self._expected = self._features(behind_normalisation(found.encoder.eval(), found.card))
        if not self._expected.isfinite().all():
            raise InputError(f"{found.uri}: features are not finite; export an encoder that converged")

    def of(self, target: Target, path: Path) -> str:
        """Read the file at ``path`` and compare its features; a line about it.

        Raises:
            InputError: its features are not the encoder's.
        """
        try:
            features = target.native(path, self._card)
            by = f"by {target.package} {_version(target.package)}".rstrip()
        except MissingPackage as missing:
            by = f"not by {target.package}: {missing}"
            own = target.own(path, self._card)
            if own is None:
                return by
            features, by = own, f"{by}. By ca2cl's own reading"
        difference = self._difference(features)
        if not difference <= target.tolerance:
            raise InputError(
                f"{target.name}: features of the file differ by {difference:.1e} of the largest ({by}), more than "
                f"{target.tolerance:.0e}; nothing was written, try another version of {target.package}"
            )
        return f"{by}: features differ by {difference:.1e} of the largest"

    def _features(self, features: Features) -> Tensor:
        """Of all tiles at once, and of the first by itself, for the batch may be of any size; (B + 1, D)."""
        with torch.inference_mode():
            return torch.cat([features(self._tiles_BCHW), features(self._tiles_BCHW[:1])])

    def _difference(self, features: Features) -> float:
        found = self._features(features)
        if found.shape != self._expected.shape:
            return float("inf")
        return float((found - self._expected).abs().max() / self._expected.abs().max().clamp_min(1e-12))


def sample_tiles(side: int) -> Tensor:
    """Three tiles (3, 3, S, S), RGB in [0, 1]: patches of strong colours, so that no two have like features."""
    generator = torch.Generator().manual_seed(0)
    coarse_BCHW = torch.rand(3, 3, 8, 8, generator=generator)
    return torch.nn.functional.interpolate(coarse_BCHW, (side, side), mode="bilinear").contiguous()


def _version(package: str) -> str:
    return str(getattr(importlib.import_module(package), "__version__", ""))
