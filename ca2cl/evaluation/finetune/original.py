"""The authors' fine-tuning and linear probe as settings (``--protocol original``).

The facts are those of their code (``ft_le.py``, ``dataset_loader.py`` of github.com/junjianli106/CA2CL) and of its logs
for NCT-CRC-HE.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ca2cl.config import OptimConfig, flatten
from ca2cl.evaluation.finetune.config import OPTIM, FinetuneConfig, Trains
from ca2cl.evaluation.protocol import HONEST, ORIGINAL, ORIGINAL_TUNING, Protocol
from ca2cl.evaluation.splits import describe_budget, replaced_rows, split_off

Integers = npt.NDArray[np.int64]
OURS: dict[str, Any] = {
    "epochs": 20, "min_steps": 200, "batch_size": 64, "held_out": 0.2, "patience": 5, "augment": "crop",
}  # fmt: skip
"""By the honest protocol, whatever is trained."""
_BOTH: dict[str, Any] = {
    "batch_size": 128, "micro_batch_size": None, "min_steps": 1, "norm": "sync", "augment": "strong",
    "precision": "no", "optim.name": "sgd_plain", "optim.momentum": 0.9, "optim.weight_decay": 0.0,
    "optim.schedule": "cosine_restarts", "optim.restart_epochs": 5, "optim.warmup_steps": 0, "optim.clip_norm": None,
    "optim.layer_decay": None, "optim.decay_all": True, "optim.freeze_layers": 0,
}  # fmt: skip
THEIRS: dict[Trains, dict[str, Any]] = {
    "all": {**_BOTH, "optim.lr": 3e-4, "held_out": 0.2, "patience": 5},
    "head": {**_BOTH, "optim.lr": 0.01},
}
"""Theirs by what is trained; the epochs depend on the labels (``their_epochs``)."""
ALWAYS = (
    "tiles are augmented by the same operations as ca2cl renders them, all geometry in one interpolation",
    "the cosine tends to 0, theirs to 4e-8",
    "draws, order and augmentation come from random numbers of ca2cl's own",
)
"""Differences from their code whatever the settings."""


def protocol_of(config: FinetuneConfig) -> Protocol:
    """Protocol of the job."""
    if config.protocol == "honest":
        return HONEST
    return ORIGINAL if config.trains == "head" else ORIGINAL_TUNING


def their_epochs(trains: Trains, budget: float) -> int:
    """Passes over the labelled tiles; of budgets between theirs as of the next larger one."""
    if trains == "head":
        return 100
    return 40 if budget <= 0.1 else 10


def epochs_of(config: FinetuneConfig, budget: float) -> int:
    """Most passes over the labelled tiles of a budget."""
    return config.epochs or their_epochs(config.trains, budget)


@dataclass(frozen=True, kw_only=True)
class Settled(FinetuneConfig):
    """Settings with a value wherever none stood for one."""

    min_steps: int
    batch_size: int
    held_out: float
    patience: int


def settled(config: FinetuneConfig) -> Settled:
    """The settings with a value wherever none stood for one; but for the epochs of the original protocol, which depend
    on the labels. There what is left of the optimizer at its default is theirs, too."""
    wanted = {} if config.protocol == "honest" else {**THEIRS[config.trains], "epochs": None}
    values = {name: wanted.get(name, value) for name, value in OURS.items() if getattr(config, name) in (None, "auto")}
    optim = {
        field.name: wanted[f"optim.{field.name}"]
        for field in dataclasses.fields(OptimConfig)
        if f"optim.{field.name}" in wanted and getattr(config.optim, field.name) == getattr(OPTIM, field.name)
    }
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return Settled(**{**given, **values, "optim": replace(config.optim, **optim)})


def draw_original(
    protocol: Protocol, count: int, budgets: Sequence[float], seeds: int, share: float
) -> dict[float, list[Integers]]:
    """Rows of ``count`` training tiles that are labelled, for every budget and seed, the smallest budget first.

    Args:
        protocol: the authors', of a task.
        count: training tiles.
        budgets: shares of the labels.
        seeds: draws of each.
        share: of the tiles that is split off first.
    """

    def draw(budget: float, seed: int) -> Integers:
        return replaced_rows(np.flatnonzero(~validation(protocol, count, share, seed)), budget, seed)

    return {budget: [draw(budget, seed) for seed in range(seeds)] for budget in sorted(set(budgets))}


def validation(protocol: Protocol, count: int, share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Mask (count,) of the training tiles that are split off before labels are drawn.

    Args:
        protocol: the authors', of a task.
        count: training tiles.
        share: of them that is split off.
        seed: of the draw.
    """
    return split_off(count, share if protocol.splits_first else 0.0, seed)


def differences(config: FinetuneConfig) -> list[str]:
    """Settings of a job by the original protocol that are not those of the authors' code, one an entry."""
    config = settled(config)
    given: Mapping[str, Any] = flatten(config)
    found = [f"{name} {given[name]}, theirs {value}" for name, value in THEIRS[config.trains].items()
             if given[name] != value]  # fmt: skip
    if config.epochs is not None:
        theirs = {budget: their_epochs(config.trains, budget) for budget in config.labels}
        other = [f"{epochs} at {describe_budget(budget)}" for budget, epochs in theirs.items()
                 if epochs != config.epochs]  # fmt: skip
        every = set(theirs.values())
        text = ", ".join(other) if len(every) > 1 else str(*every)
        found += [f"epochs {config.epochs}, theirs {text}"] if other else []
    return found
