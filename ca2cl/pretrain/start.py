"""Initial encoder of a run, and the metadata of its weights."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

import torch

from ca2cl.config import ModelConfig
from ca2cl.data.fingerprints.seen import Seen
from ca2cl.models.backbone import Backbone, build_encoder, has_batch_norm
from ca2cl.models.encoder_io import EncoderCard
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.registry.resolve import ResolvedEncoder, resolve_encoder
from ca2cl.runtime.launched import find_place
from ca2cl.weights.load import Start

logger = logging.getLogger(__name__)
_RANDOM = "random"


@dataclass
class RunStart:
    """Weights that a run begins with, and their card and file; None for random ones.

    Attributes:
        encoder: until ``initial_encoder`` has taken its tensors.
        seen: tiles that the weights were trained on, where that was kept.
    """

    encoder: Backbone | None = None
    card: EncoderCard | None = None
    start: Start | None = None
    seen: Seen | None = None

    @property
    def manifests(self) -> tuple[str, ...]:
        """Identities of the tiles that the weights were trained on, as far as known."""
        return self.card.manifests if self.card else ()

    def facts(self) -> dict[str, Any]:
        """Fields of the trained encoder's card."""
        start, card = self.start, self.card
        if start is None or card is None:
            return {}
        return {
            "start": start.source,
            "start_layout": start.layout,
            "start_tensors": start.tensors,
            "start_sha256": start.sha256,
            "licence": card.licence,
            "licence_text": card.licence_text,
            "mpp": card.mpp,
        }

    def tags(self) -> dict[str, str]:
        """Tags of the run in MLflow."""
        return {
            f"ca2cl.{name}": str(value)
            for name, value in self.facts().items()
            if value is not None and name != "licence_text"
        }


def find_start(config: PretrainConfig) -> tuple[PretrainConfig, RunStart]:
    """The weights of ``model.weights``, and the configuration with what they decide: mean, std and pooling where these
    are left open. Rank 0 logs it.

    Raises:
        InputError: no such weights, or those of another architecture.
    """
    model, given = config.model, None
    if model.weights != _RANDOM:
        tracking = config.tracking
        given = resolve_encoder(model.weights, arch=model.arch, tracking_uri=tracking.uri, root=tracking.root)
    filled = _filled(model, given)
    if find_place().rank == 0:
        logger.info("start: %s", _described(config, given))
        if given is not None:
            logger.info("%s", _taken(model, filled, given))
    begun = RunStart(given.encoder, given.card, given.start, given.seen) if given else RunStart()
    return dataclasses.replace(config, model=filled), begun


def initial_encoder(config: PretrainConfig, start: RunStart) -> Backbone:
    """The encoder that training begins with, equal on all ranks."""
    model = config.model
    torch.manual_seed(config.run.seed)
    encoder = build_encoder(
        model.arch, model.norm, group=model.norm_group, image_size=config.data.image_size, identity_blocks=True,
        pooling=model.pooling, drop_path=model.drop_path,
    )  # fmt: skip
    if not has_batch_norm(encoder) and find_place().rank == 0:
        logger.info("model.norm %s changes nothing: %s has no BatchNorm", model.norm, model.arch)
    _warn_of_the_start(config)
    if start.encoder is not None:
        encoder.load_state_dict(encoder.fitted(start.encoder.state_dict()))
        start.encoder = None  # a second copy of a large body would stay in memory
    return encoder


def _warn_of_the_start(config: PretrainConfig) -> None:
    """Warn of settings for given weights where the first ones are random, and of an average that never leaves them."""
    optim, steps = config.optim, config.run.steps
    if find_place().rank != 0:
        return
    if config.model.weights == "random" and (optim.layer_decay or optim.freeze_layers):
        logger.warning(
            "model.weights is random, and optim.layer_decay and optim.freeze_layers keep first layers near their start"
        )
    if optim.ema is not None and steps is not None and steps * (1 - optim.ema) < 2:
        logger.warning(
            "optim.ema is %g: %d steps are few for an average of about %.0f; much of it will be the initial weights",
            optim.ema, steps, 1 / (1 - optim.ema),
        )  # fmt: skip


def _filled(model: ModelConfig, given: ResolvedEncoder | None) -> ModelConfig:
    mean, std = model.normalisation
    pooling = model.pooling
    if given is not None:
        card = given.card
        mean, std = model.mean or _triple(card.mean), model.std or _triple(card.std)
        pooling = card.pooling if pooling == "default" else pooling
    return dataclasses.replace(model, mean=mean, std=std, pooling=pooling)


def _triple(values: tuple[float, ...]) -> tuple[float, float, float]:
    first, second, third = values
    return first, second, third


def _described(config: PretrainConfig, given: ResolvedEncoder | None) -> str:
    if given is None or given.start is None:
        return f"{config.model.arch} from {config.model.weights} weights, seed {config.run.seed}"
    return f"{config.model.arch} from {given.start}"


def _taken(model: ModelConfig, filled: ModelConfig, given: ResolvedEncoder) -> str:
    """What was taken from the weights' own configuration, and what was not."""
    card, words = given.card, []
    whose = "ImageNet's, for the weights state none" if given.bare else "the weights'"
    for name in ("mean", "std"):
        asked = getattr(model, name) is not None
        words.append(f"{name} {_numbers(getattr(filled, name))} ({f'model.{name}' if asked else whose})")
    words.append(f"pooling {filled.pooling}")
    if card.mpp:
        words.append(f"{card.mpp:g} micrometres a pixel")
    words.append(f"licence {card.licence or 'not stated by the source'}")
    return f"weights for tiles of {card.input_size} pixels: {', '.join(words)}"


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)
