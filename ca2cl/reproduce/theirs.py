"""What the method's authors published for NCT-CRC-HE (Li et al., IEEE JBHI 2025, doi 10.1109/JBHI.2025.3552640).

ResNet-18, nine classes, tested on CRC-VAL-HE-7K. They chose the epoch by the test tiles and drew labels with
replacement; ``last_epoch`` is what their own logs say of the last epoch, which nothing was chosen by.
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """One cell of their tables."""

    accuracy: float
    macro_f1: float
    last_epoch: float | None = None
    """Accuracy after the last epoch; only of the linear probe."""


LINEAR: dict[float, Published] = {
    0.01: Published(0.967, 0.953, 0.9653),
    0.1: Published(0.969, 0.959, 0.9682),
    0.5: Published(0.969, 0.958, 0.9634),
    1.0: Published(0.968, 0.956, 0.9645),
}
FINETUNED: dict[float, Published] = {
    0.01: Published(0.958, 0.941),
    0.1: Published(0.967, 0.954),
    0.5: Published(0.968, 0.957),
    1.0: Published(0.970, 0.960),
}
BUDGETS = tuple(LINEAR)
FOUNDATION = {"Virchow2": 0.967, "UNI": 0.944}
"""Accuracy of foundation models by a linear probe on the same test tiles, for scale."""
ARCHITECTURE, IMAGE_SIZE = "resnet18", 224
