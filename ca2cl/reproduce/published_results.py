"""Published and logged results of the method's authors for NCT-CRC-HE.

Li et al., IEEE JBHI 2025, doi 10.1109/JBHI.2025.3552640; logs/NCT of github.com/junjianli106/CA2CL.

ResNet-18, nine classes, tested on CRC-VAL-HE-7K, labels drawn with replacement. Fine-tuning: mean and sample sd over
their five logged seeds, the epoch chosen by 20,000 training tiles that were split off. Linear probe: one seed, the
epoch chosen by the test tiles; ``last_epoch`` is what the log says of the last one, which nothing was chosen by.
"""

from __future__ import annotations

from typing import NamedTuple

from ca2cl.evaluation.result import ENCODER


class Published(NamedTuple):
    """One cell of their tables."""

    accuracy: float
    macro_f1: float
    last_epoch: float | None = None
    """Accuracy after the last epoch; only of the linear probe."""
    accuracy_sd: float | None = None
    macro_f1_sd: float | None = None


Cells = dict[float, Published]
"""By the share of the labels."""


def _tuned(*cells: tuple[float, float, float, float]) -> Cells:
    """From accuracy, its sd, macro F1 and its sd."""
    return {budget: Published(accuracy, f1, None, sd, f1_sd)
            for budget, (accuracy, sd, f1, f1_sd) in zip(BUDGETS, cells, strict=True)}  # fmt: skip


BUDGETS = (0.01, 0.1, 0.5, 1.0)
IMAGENET, RANDOM = "torchvision:IMAGENET1K_V1", "random"
LINEAR: dict[str, Cells] = {
    ENCODER: {
        0.01: Published(0.967, 0.953, 0.9653),
        0.1: Published(0.969, 0.959, 0.9682),
        0.5: Published(0.969, 0.958, 0.9634),
        1.0: Published(0.968, 0.956, 0.9645),
    },
    IMAGENET: {
        0.01: Published(0.8787, 0.8351, 0.8663),
        0.1: Published(0.8937, 0.8622, 0.8841),
        0.5: Published(0.8944, 0.8548, 0.8901),
        1.0: Published(0.8939, 0.8649, 0.8869),
    },
    RANDOM: {
        0.01: Published(0.5357, 0.4295, 0.4696),
        0.1: Published(0.6428, 0.5490, 0.5918),
        0.5: Published(0.6592, 0.6051, 0.5969),
        1.0: Published(0.6563, 0.5614, 0.6110),
    },
}
"""By what the classifier starts from; encoders other than theirs are from their logs alone."""
FINETUNED: dict[str, Cells] = {
    ENCODER: _tuned(
        (0.9586, 0.0034, 0.9393, 0.0071), (0.9655, 0.0021, 0.9510, 0.0035),
        (0.9681, 0.0010, 0.9558, 0.0015), (0.9689, 0.0007, 0.9576, 0.0015),
    ),
    IMAGENET: _tuned(
        (0.8285, 0.0227, 0.7778, 0.0316), (0.9344, 0.0028, 0.9081, 0.0041),
        (0.9378, 0.0021, 0.9129, 0.0035), (0.9412, 0.0032, 0.9169, 0.0040),
    ),
    RANDOM: _tuned(
        (0.4188, 0.0335, 0.2863, 0.0352), (0.7307, 0.0234, 0.6624, 0.0204),
        (0.7532, 0.0185, 0.6695, 0.0323), (0.8539, 0.0152, 0.8071, 0.0243),
    ),
}  # fmt: skip
CHOICE = (
    "theirs: fine-tuning is the mean ± sd of five logged seeds, the epoch chosen by 20,000 training tiles split off; "
    "the linear probe is one seed, the epoch chosen by the test tiles; `last epoch` is theirs where nothing was chosen"
)
FOUNDATION = {"Virchow2": 0.967, "UNI": 0.944}
"""Accuracy of foundation models by a linear probe on the same test tiles, for scale."""
ARCHITECTURE, IMAGE_SIZE = "resnet18", 224
