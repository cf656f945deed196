"""Content of a heat-map: classes of a classifier, or clusters.

Legend: N tiles, D features, K classes or clusters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ca2cl.common.scratch import scratch_folder
from ca2cl.config import Pooling
from ca2cl.errors import InputError
from ca2cl.evaluation.linear_head import SUFFIX, HeadCard, LinearHead, read_head
from ca2cl.heatmap.clusters import ClusterHead
from ca2cl.heatmap.config import HeatmapConfig
from ca2cl.models.encoder_card import CARD_NAME
from ca2cl.registry.resolve import ResolvedEncoder, resolve_encoder
from ca2cl.registry.versions import existing_store
from ca2cl.store.artifacts import fetch, inside, names_in, run_place
from ca2cl.store.names import WORD, full_run_id, is_stored
from ca2cl.store.open import Store, find_run

_FINETUNE = "finetune.json"
_CLASSIFIERS = "cells/**/classifier"
_DIGITS = 8
"""Of a run's id in pictures."""


@dataclass(frozen=True)
class Scorer:
    """An encoder, and the classifier of its vectors."""

    found: ResolvedEncoder
    name: str
    """How pictures call it."""
    head: LinearHead | ClusterHead | None
    """None for clusters that are not found yet."""
    classes: tuple[str, ...]
    image_size: int
    pooling: Pooling = "default"
    card: HeadCard | None = None
    """Of a probe's classifier."""

    def with_clusters(self, head: ClusterHead) -> Scorer:
        """The same encoder with clusters as classes."""
        names = tuple(f"cluster {number}" for number in range(1, len(head.centroids_KD) + 1))
        return replace(self, head=head, classes=names)

    def probabilities(self, values_ND: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Of the classes, (N, K)."""
        assert self.head is not None
        return self.head.probabilities(values_ND)


def find_scorer(config: HeatmapConfig) -> Scorer:
    """Find what ``config.run`` names.

    Raises:
        InputError: there is none such, it is of another encoder than is there now, or an encoder without classes and
            no number of clusters is given.
    """
    path = _head_file(Path(config.run).expanduser())
    if path is not None:
        return _of_probe(config, *read_head(path), name=path.name.removesuffix(SUFFIX))
    stored = _stored(config)
    if stored is not None and stored.kind == "probe":
        return _of_stored(config, stored)
    try:
        found = resolve_encoder(_classifier(config.run), **_where(config))
    except InputError as error:
        if stored is None or stored.kind != "finetune":
            raise
        raise InputError(
            f"run {config.run!r}: a fine-tuning without a registered classifier; give its folder, or fine-tune with "
            "--tracking.register_as"
        ) from error
    named = Path(config.run).expanduser()
    name = named.resolve().name if named.exists() else config.run
    if config.clusters is not None:
        return Scorer(found, name, None, (), found.card.input_size)
    if found.head is None:
        raise InputError(
            f"run {config.run!r}: an encoder without classes; give a probe's run, a fine-tuned classifier, or "
            "--clusters 6"
        )
    head = LinearHead(found.head.weight.float().numpy(), found.head.bias.float().numpy())
    return Scorer(found, name, head, found.card.predicts, found.card.input_size)


def _where(config: HeatmapConfig) -> dict[str, Any]:
    return {"tracking_uri": config.tracking.uri, "root": config.tracking.root}


def _head_file(path: Path) -> Path | None:
    """The classifier's file of a probe that is named by it, or by the JSON beside it."""
    if path.name.endswith(SUFFIX):
        return path
    if path.suffix != ".json" or not path.is_file():
        return None
    beside = path.with_name(f"{path.stem}{SUFFIX}")
    if not beside.exists():
        raise InputError(f"{path}: {beside.name} is not beside it; probe again with the classifier logistic or sgd")
    return beside


def _classifier(run: str) -> str:
    """The folder of a fine-tuning's best classifier; what does not name a fine-tuning as it is."""
    folder = Path(run).expanduser()
    if not (folder / _FINETUNE).is_file():
        return run
    kept = [path for path in sorted(folder.glob(_CLASSIFIERS)) if (path / CARD_NAME).exists()]
    if not kept:
        raise InputError(f"{folder}: holds no classifier; let the fine-tuning finish, with the protocol honest")
    return str(kept[0])


class _Stored(NamedTuple):
    """A run in the store, and what kind it is; empty for a pre-training."""

    store: Store
    run_id: str
    kind: str


def _stored(config: HeatmapConfig) -> _Stored | None:
    """The run of that id; None for anything else, such as a registered version or a path."""
    run = config.run
    if run.startswith("models:/") or (not is_stored(run) and not WORD.fullmatch(run)):
        return None
    store = existing_store(config.tracking)
    if store is None or (not is_stored(run) and Path(run).expanduser().exists()):
        return None
    run_id = full_run_id(store, run)
    found = find_run(store, run_id) if run_id is not None else None
    return _Stored(store, str(run_id), found.data.tags.get("ca2cl.kind", "")) if found is not None else None


def _of_stored(config: HeatmapConfig, stored: _Stored) -> Scorer:
    store, run_id, _ = stored
    place = run_place(store, run_id)
    names = [name for name in names_in(store, place) if name.endswith(SUFFIX)]
    if not names:
        raise InputError(
            f"run {run_id!r}: a probe without a linear classifier (of an older version, of --protocol original or of "
            "k-NN alone); probe again"
        )
    with scratch_folder() as scratch:
        head, card = read_head(fetch(store, inside(place, names[0]), scratch))
    return _of_probe(config, head, card, name=f"probe {run_id[:_DIGITS]}")


def _of_probe(config: HeatmapConfig, head: LinearHead, card: HeadCard, name: str) -> Scorer:
    try:
        found = resolve_encoder(config.encoder or card.encoder, **_where(config))
    except InputError as error:
        raise InputError(f"{error} (the encoder of {name}; name it with --encoder where it is now)") from None
    if found.digest() != card.weights:
        raise InputError(
            f"{name}: was fitted to other weights than those of {config.encoder or card.encoder}; give the encoder "
            "that was probed with --encoder, or probe again"
        )
    classes = () if config.clusters is not None else card.classes
    return Scorer(
        found, name, None if config.clusters is not None else head, classes, card.image_size, card.pooling, card
    )
