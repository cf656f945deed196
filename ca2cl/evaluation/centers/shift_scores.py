"""Accuracy of fitted classifiers on shifted test tiles, batch by batch.

Legend: N test tiles.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ca2cl.common.console.progress import ProgressBar
from ca2cl.evaluation.centers.shifts import SHIFTS, Shift
from ca2cl.evaluation.features import Extractor, Features
from ca2cl.evaluation.linear_head import LinearHead
from ca2cl.evaluation.statistics import Interval, Units, bootstrap_interval, paired_difference

logger = logging.getLogger(__name__)
CLEAN = "clean"


@dataclass(frozen=True)
class ShiftScore:
    """Accuracy of one kind of features on the test tiles after one shift."""

    features: str
    family: str
    """``clean`` for the tiles as they are."""
    strength: int
    accuracy: float
    accuracy_interval_95: Interval
    drop: float
    """From the tiles as they are."""
    drop_interval_95: Interval

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def shift_scores(
    batches: Iterable[tuple[Tensor, Tensor, Tensor]], extractors: Mapping[str, Extractor],
    heads: Mapping[str, LinearHead], clean: Features, units: Units, *, device: torch.device, title: str,
    shifts: tuple[Shift, ...] = SHIFTS,
) -> list[ShiftScore]:  # fmt: skip
    """Score every shift; memory does not grow with the features' length. Costs as many passes as there are shifts.

    Args:
        batches: tiles uint8 (B, H, W, 3), labels, sample numbers, in the order of ``clean``.
        extractors: as for the tiles as they are.
        heads: classifier of each kind of features.
        clean: features of the tiles as they are.
        units: what tiles are resampled by.
        device: where features are computed.
        title: of the progress bar.
        shifts: in the order of the table.
    """
    right: dict[tuple[str, str], list[npt.NDArray[np.bool_]]] = {}
    with torch.inference_mode(), ProgressBar(total=len(clean) * len(shifts), desc=title, unit="tile") as bar:
        for tiles_BHWC, labels_B, _ in batches:
            on_device = tiles_BHWC.to(device, non_blocking=True)
            for shift in shifts:
                shifted = shift.apply(on_device)
                for name, values_BD in _features(extractors, shifted):
                    if name in heads:
                        predicted_B = heads[name].probabilities(values_BD).argmax(axis=1)
                        right.setdefault((name, shift.name), []).append(predicted_B == labels_B.numpy())
                bar.update(len(tiles_BHWC))
    found = []
    for name, head in heads.items():
        clean_1N = (head.probabilities(clean.values[name]).argmax(axis=1) == clean.labels_N)[None]
        found.append(_score(name, CLEAN, 0, clean_1N, clean_1N, units))
        for shift in shifts:
            right_1N = np.concatenate(right[name, shift.name])[None]
            found.append(_score(name, shift.family, shift.strength, right_1N, clean_1N, units))
    return found


def _features(extractors: Mapping[str, Extractor], tiles: Tensor) -> Iterable[tuple[str, npt.NDArray[np.float32]]]:
    for name, extractor in extractors.items():
        made = extractor(tiles)
        for key, values in made.items() if isinstance(made, Mapping) else [(name, made)]:
            yield key, values.float().cpu().numpy()


def _score(
    name: str, family: str, strength: int, right_1N: npt.NDArray[np.bool_], clean_1N: npt.NDArray[np.bool_],
    units: Units,
) -> ShiftScore:  # fmt: skip
    drop = paired_difference(clean_1N, right_1N, units, resamples=1)
    interval = bootstrap_interval(right_1N, units)
    return ShiftScore(name, family, strength, float(right_1N.mean()), interval, drop.mean, drop.interval)
