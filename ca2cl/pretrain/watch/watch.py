"""Watch of a run: measure the encoder, keep the best, stop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ca2cl.errors import InputError
from ca2cl.methods.base import Method
from ca2cl.models.backbone import Backbone
from ca2cl.models.encoder_card import EncoderCard
from ca2cl.pretrain.watch import measures
from ca2cl.pretrain.watch.best import BestEncoder
from ca2cl.pretrain.watch.collapse import apart, collapse_of
from ca2cl.pretrain.watch.config import WatchConfig
from ca2cl.pretrain.watch.held_out import OwnTiles, WatchedTiles
from ca2cl.pretrain.watch.passes import Passes, Share, gather
from ca2cl.pretrain.watch.state import STATE, WatchState
from ca2cl.runtime.distributed import Ranks
from ca2cl.training.engine import AccelerateEngine

logger = logging.getLogger(__name__)
IN_A_ROW = 2
"""Watches in a row that must find a collapse."""
_REMEDY = (
    "lower optim.lr, raise optim.warmup_steps or run.batch_size, or look at the method's negatives; begin again in "
    "another run.output_dir"
)


@dataclass(frozen=True)
class Centroids:
    """Settings of k-means: ``objective.clusters`` and ``objective.lloyd_iterations``."""

    clusters: int
    iterations: int


class Report(Protocol):
    """Receives what a watch finds, on rank 0."""

    def log_watch(self, step: int, numbers: Mapping[str, float], collapse: str) -> None:
        """Numbers by their names in the journal, and the reason for a collapse (or empty)."""

    def log_collapse(self, step: int, reason: str) -> None:
        """The features have collapsed at ``IN_A_ROW`` watches, for the first time."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a watch needs of the job.

    Attributes:
        method: knows the encoder and the embeddings of its network.
        passes: embeds tiles.
        own: this rank's tiles.
        reference: this rank's tiles of the reference, if there is one.
        centroids: settings of k-means.
        ranks: of the job.
        report: receives the numbers; on ranks other than 0 it may ignore them.
        card: of the encoder after so many optimizer steps; called after ``report.log_watch``.
        best: where the best encoder is kept.
        state: what every checkpoint carries.
        total_steps: of the run.
    """

    method: Method
    passes: Passes
    own: OwnTiles
    reference: OwnTiles | None
    centroids: Centroids
    ranks: Ranks
    report: Report
    card: Callable[[Backbone, int], EncoderCard]
    best: BestEncoder
    state: dict[str, Any]
    total_steps: int


class Watch:
    """Looks at the encoder every so many steps (``training.loop.Watch``).

    Args:
        config: its settings.
        tiles: that are watched.
        parts: of the job.
        state: of the watches before the first step of this start.
    """

    def __init__(self, config: WatchConfig, tiles: WatchedTiles, parts: Parts, state: WatchState) -> None:
        self._config, self._tiles, self._parts = config, tiles, parts
        self._metric = metric_of(config, tiles)
        self._keep(state)

    @property
    def best(self) -> Path | None:
        """Folder of the best encoder, if there is one."""
        return self._parts.best.folder if self.state.best_step else None

    def due(self, step: int) -> bool:
        """Whether the watch looks after optimizer step ``step``."""
        return step % self._config.every == 0 or step == self._parts.total_steps

    def look(self, step: int, engine: AccelerateEngine) -> None:
        """Measure the encoder after optimizer step ``step``; with averaged weights if the run keeps an average. Every
        rank calls it.

        Raises:
            InputError: on every rank alike: the features have collapsed and ``watch.stop`` is set, the tiles cannot be
                read, or the best encoder cannot be written.
        """
        parts, started = self._parts, time.perf_counter()
        with engine.averaged():
            network = engine.bare
            share = parts.ranks.together(lambda: parts.passes.share(parts.method, network, parts.own, engine.device))
            whole, others = gather(share, parts.ranks), self._reference(engine)
            self._keep(parts.ranks.from_first(lambda: self._judge(step, engine, whole, others, started)))
        if self.state.collapsed >= IN_A_ROW and self._config.stop:
            raise InputError(self._ending(step))

    def _reference(self, engine: AccelerateEngine) -> Share | None:
        """Features of the reference, if there is one."""
        parts, own = self._parts, self._parts.reference
        if own is None:
            return None
        return gather(
            parts.ranks.together(lambda: parts.passes.share(parts.method, engine.bare, own, engine.device, 0)),
            parts.ranks,
        )

    def _judge(
        self, step: int, engine: AccelerateEngine, whole: Share, others: Share | None, started: float
    ) -> WatchState:  # fmt: skip
        """Compute and report the numbers, and keep the encoder if it is the best. Returns the state after that."""
        parts = self._parts
        numbers, collapse = measure(whole, self._tiles.only(whole.places), parts.centroids, others)
        numbers["seconds"] = time.perf_counter() - started
        parts.report.log_watch(step, numbers, collapse)
        state = self.state.after(collapse)
        value = worth(self._metric, numbers)
        if not collapse and (state.best_step == 0 or value > state.best_value):
            encoder = parts.method.encoder(engine.bare)
            card = parts.best.write(engine.weights(encoder), parts.card(encoder, step))
            state = replace(state, best_step=step, best_value=value, card=card)
        if state.collapsed >= IN_A_ROW and not state.warned:
            parts.report.log_collapse(step, collapse)
            if not self._config.stop:
                logger.warning("watch: collapsed at steps up to %d, %s; %s", step, collapse, _REMEDY)
            state = replace(state, warned=True)
        return replace(state, reason=collapse)

    def _keep(self, state: WatchState) -> None:
        self.state = state
        self._parts.state[STATE] = state.as_dict()

    def _ending(self, step: int) -> str:
        state = self.state
        kept = f"; the encoder of step {state.best_step} is in {self._parts.best.folder}" if state.best_step else ""
        return (
            f"watch.stop is true: the features have collapsed at {state.collapsed} watches in a row, the last at step "
            f"{step} ({state.reason}); {_REMEDY}{kept}"
        )


def metric_of(config: WatchConfig, tiles: WatchedTiles) -> str:
    """Name of the number that the best encoder is chosen by."""
    if config.metric != "auto":
        return config.metric
    return "linear" if tiles.labels_N is not None else "uniformity"


def worth(metric: str, numbers: Mapping[str, float]) -> float:
    """What the best encoder has most of."""
    return -numbers[metric] if metric == "uniformity" else numbers[metric]


def measure(
    share: Share, tiles: WatchedTiles, centroids: Centroids, reference: Share | None = None
) -> tuple[dict[str, float], str]:  # fmt: skip
    """The numbers of a watch by name, NaN where a feature is not finite, and the reason for a collapse (or empty).

    Args:
        share: features of all tiles.
        tiles: their labels and slides.
        centroids: settings of k-means.
        reference: features of ``tiles.reference``, if there is one.
    """
    values_ND, embeddings_NE = share.features.double(), share.embeddings.double()
    collapse = collapse_of(values_ND, embeddings_NE)
    numbers = dict.fromkeys(("knn", "linear") if tiles.labels_N is not None else (), math.nan)
    numbers |= dict.fromkeys(("rank", "alignment", "uniformity", "apart", "largest", "smallest"), math.nan)
    if not values_ND.isfinite().all():
        return numbers, collapse
    unit_ND = measures.unit_rows(values_ND)
    if tiles.labels_N is not None:
        numbers["knn"], numbers["linear"] = _accuracies(values_ND, tiles, reference)
    numbers["rank"] = measures.effective_rank(values_ND)
    numbers["alignment"] = float(share.distances.mean())
    numbers["uniformity"] = measures.uniformity(unit_ND)
    numbers["apart"] = apart(embeddings_NE if embeddings_NE.shape[1] else values_ND)
    largest, smallest = measures.centroid_shares(unit_ND, centroids.clusters, centroids.iterations)
    return {**numbers, "largest": largest, "smallest": smallest}, collapse


def _accuracies(values_ND: Tensor, tiles: WatchedTiles, reference: Share | None) -> tuple[float, float]:
    """By k-NN and by the linear probe, of labelled tiles."""
    assert tiles.labels_N is not None and tiles.fold_N is not None
    labels, units, folds = (torch.from_numpy(x) for x in (tiles.labels_N, tiles.unit_N, tiles.fold_N))
    if reference is None or tiles.reference is None:
        rows_ND = measures.centred_rows(values_ND)
        by_neighbours = measures.neighbour_accuracy(rows_ND, labels, units)
        return by_neighbours, measures.linear_accuracy(rows_ND, labels, folds)
    theirs = tiles.reference.only(reference.places).labels_N
    assert theirs is not None
    if not reference.features.isfinite().all():
        return math.nan, math.nan
    return measures.accuracies_from(reference.features.double(), torch.from_numpy(theirs), values_ND, labels)
