"""Settings of the watch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from annotated_types import Ge, Interval

from ca2cl.common.ranges import check_ranges

Metric = Literal["auto", "knn", "linear", "rank", "uniformity"]


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Measurements of the encoder on held-out tiles while it trains. They change no weight."""

    shards: str = ""
    """Folder or URL of held-out shards, with labels or without. Not those of data.shards. Empty: no watch."""
    labelled: str = ""
    """Folder or URL of labelled shards of other slides: their tiles vote in k-NN and fit the linear probe, as in ca2cl
    probe. Empty: the watched tiles of other slides; where watch.shards names no slides, data.shards if it has their
    classes, and otherwise all other watched tiles."""
    every: int = 200
    """Optimizer steps between watches; there is always one at the end."""
    tiles: int = 2000
    """Tiles that are watched, at most: the same ones each time, as many of each class where there are labels. Half of
    them are labelled tiles of other shards, where those vote."""
    metric: Metric = "auto"
    """The number whose best encoder is kept in the run's folder best and registered under the alias best. knn, linear:
    accuracies, which need labels; rank: the effective rank; uniformity: the lowest; auto: linear where there are
    labels, and else uniformity."""
    stop: bool = False
    """Whether to end the run if the features have collapsed at two watches in a row. false: only warn, once."""
    seed: int = 0
    """Seed of the choice of tiles, and of the two views of alignment."""

    def __post_init__(self) -> None:
        check_ranges(self, "watch", every=Ge(1), tiles=Ge(64), seed=Interval(ge=0, lt=2**31))
