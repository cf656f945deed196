"""Encoders and baselines that a probe compares.

On CRC-VAL-HE-7K a colour histogram alone passes 82 % (arXiv 2409.11546), so no table of ca2cl comes without one.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ca2cl.config import Pooled
from ca2cl.errors import InputError
from ca2cl.evaluation.features import Extractor, colour_histogram, frozen
from ca2cl.evaluation.probe.config import ProbeConfig
from ca2cl.evaluation.report import metric_names
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

        def features_of(name: str, found: ResolvedEncoder, size: int, tokens: Sequence[Pooled]) -> Extractor:
            found = found.at(size)
            card, encoder = found.card, found.encoder.to(device)
            named = {f"{name} ({way})": way for way in tokens if encoder.poolings}
            return frozen(encoder, size, card.mean, card.std, named)

        made: dict[str, Extractor] = {}
        for name, found in {ENCODER: self.encoder, **self.rivals}.items():
            made[name] = features_of(name, found, config.image_size or found.card.input_size, config.tokens)
        if config.floors:
            made[COLOURS] = colour_histogram
        # a floor sees tiles at the encoder's size, and has its first features: it differs by its weights alone
        size = config.image_size or self.encoder.card.input_size
        return made | {name: features_of(name, found, size, config.tokens[:1]) for name, found in self.floors.items()}

    def tracked_names(self, tokens: Sequence[Pooled]) -> dict[str, str]:
        """Names in MLflow of the features whose names in the table it does not take: ``against/NAME``, and
        ``encoder/mean`` of tokens."""
        names = metric_names(list(self.rivals))
        of_tokens = {
            f"{name} ({way})": f"{names.get(name, name)}/{way}"
            for name in (ENCODER, *self.rivals, *self.floors)
            for way in tokens
        }
        return names | of_tokens


def find_contenders(config: ProbeConfig) -> Contenders:
    """Resolve every encoder.

    Raises:
        InputError: one that was asked for is not there. A floor that is not there is left out with a warning.
    """
    where: dict[str, Any] = {"tracking_uri": config.tracking.uri, "root": config.tracking.root}
    first = resolve_encoder(config.encoder, **where)
    first.encoder.check_tokens(config.tokens, config.encoder)
    taken = {ENCODER, *FLOORS}
    rivals = {}
    for name in config.against:
        # what has no architecture of its own is of the first one's
        arch = first.card.arch if name.startswith(("random", "torchvision:")) and not Path(name).exists() else None
        rival = resolve_encoder(name, arch=arch, like=first.card, **where).beside(first)
        if rival.encoder.poolings:  # one without tokens keeps its own features
            rival.encoder.check_tokens(config.tokens, name)
        rivals[name if name not in taken else f"./{name}"] = rival
    floors = {}
    if config.floors:
        floors[RANDOM] = resolve_encoder("random", arch=first.card.arch, like=first.card)
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
