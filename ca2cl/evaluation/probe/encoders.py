"""Encoders and baselines that a probe compares.

On CRC-VAL-HE-7K a colour histogram alone passes 82 % (arXiv 2409.11546), so no table of ca2cl comes without one.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ca2cl.errors import InputError
from ca2cl.evaluation.features import Extractor, frozen
from ca2cl.evaluation.probe.config import ProbeConfig
from ca2cl.evaluation.result import ENCODER
from ca2cl.registry.resolve import ResolvedEncoder, resolve_encoder

logger = logging.getLogger(__name__)

COLOURS, RANDOM, IMAGENET = "colour histogram", "random encoder", "ImageNet encoder"
FLOORS = (COLOURS, RANDOM, IMAGENET)
_IMAGENET_WEIGHTS = "torchvision:IMAGENET1K_V1"
_PATIENCE = 30.0  # seconds without an answer


@dataclass(frozen=True)
class Contenders:
    """The encoder that is probed, those that it is compared with, and the floors."""

    encoder: ResolvedEncoder
    rivals: dict[str, ResolvedEncoder]
    """By the name that stands in the table."""
    floors: dict[str, ResolvedEncoder]
    """Those that are networks; the colour histogram is none."""

    def extractors(self, config: ProbeConfig, device: torch.device) -> dict[str, Extractor]:
        """Feature extractor of each one, by its name in the table."""

        def features_of(found: ResolvedEncoder, size: int | None = None) -> Extractor:
            card = found.card
            return frozen(found.encoder.to(device), size or config.image_size or card.input_size, card.mean, card.std)

        made = {ENCODER: features_of(self.encoder)}
        made |= {name: features_of(found) for name, found in self.rivals.items()}
        if config.floors:
            made[COLOURS] = colour_histogram
        # a floor sees tiles at the encoder's size: it differs by its weights alone
        size = config.image_size or self.encoder.card.input_size
        return made | {name: features_of(found, size) for name, found in self.floors.items()}


def find_contenders(config: ProbeConfig) -> Contenders:
    """Resolve every encoder.

    Raises:
        InputError: one that was asked for is not there. A floor that is not there is left out with a warning.
    """
    where: dict[str, Any] = {"tracking_uri": config.tracking.uri, "root": config.tracking.root}
    first = resolve_encoder(config.encoder, **where)
    taken = {ENCODER, *FLOORS}
    rivals = {}
    for name in config.against:
        # what has no architecture of its own is of the first one's
        arch = first.card.arch if name.startswith(("random", "torchvision:")) and not Path(name).exists() else None
        rivals[name if name not in taken else f"./{name}"] = resolve_encoder(name, arch=arch, **where).beside(first)
    floors = {}
    if config.floors:
        floors[RANDOM] = resolve_encoder("random", arch=first.card.arch)
        if config.imagenet and _IMAGENET_WEIGHTS not in (config.encoder, *config.against):
            floors |= _imagenet(first.card.arch)
    return Contenders(first, rivals, floors)


def _imagenet(arch: str) -> dict[str, ResolvedEncoder]:
    try:
        with _patience(_PATIENCE):
            return {IMAGENET: resolve_encoder(_IMAGENET_WEIGHTS, arch=arch)}
    except InputError as error:
        logger.warning("no ImageNet floor in this table: %s", error)
        return {}


@contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """A network that does not answer ends in an error: torchvision's download waits for ever otherwise."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def colour_histogram(tiles_BHWC: Tensor, bins: int = 32) -> Tensor:
    """Share of a tile's pixels in each of ``bins`` equal ranges of red, then of green, then of blue.

    Args:
        tiles_BHWC: uint8, shape (B, H, W, 3).
        bins: a divisor of 256.

    Returns:
        float32, shape (B, 3 * bins); each third of a row sums to 1.
    """
    assert tiles_BHWC.dtype == torch.uint8 and 256 % bins == 0
    batch, height, width, channels = tiles_BHWC.shape
    # One bincount for the whole batch: every (tile, channel) pair gets its own range of bins. In place and in int32:
    # the numbers fit, and memory traffic is what this costs.
    offset_BC = torch.arange(batch * channels, dtype=torch.int32, device=tiles_BHWC.device) * bins
    bin_BHWC = (tiles_BHWC // (256 // bins)).int().add_(offset_BC.view(batch, 1, 1, channels))
    counts = torch.bincount(bin_BHWC.flatten(), minlength=batch * channels * bins)
    return (counts.view(batch, channels * bins) / (height * width)).float()
