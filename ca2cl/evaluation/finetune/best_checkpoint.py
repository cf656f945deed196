"""Keep the classifier with the best held-out score.

Of the cells with the most labels; test tiles are never used to choose.

Its folder is an encoder's folder whose weights have a head ``fc`` and whose card names the head's classes: the weights
are a torchvision ResNet with as many classes, and wherever a verb takes an encoder it takes this one too.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ca2cl.common.records import parse_json
from ca2cl.evaluation.labelled import BY_SLIDES
from ca2cl.models.classifier import Classifier
from ca2cl.models.encoder_io import EncoderCard, save_encoder

FOLDER = "classifier"
KEPT = "free some space and start again: finished cells and the last checkpoint are kept"


def keep(folder: Path, network: Classifier, card: EncoderCard, facts: Mapping[str, Any]) -> None:
    """Write a cell's classifier to ``folder / FOLDER``, its head's logits divided by the cell's temperature if whole
    slides chose that: whatever reads it then has scaled probabilities.

    Args:
        folder: of the trial.
        network: the classifier.
        card: of the encoder that it was trained from.
        facts: of the trial: steps, held-out loss and accuracy, temperature and what chose it.
    """
    state = dict(network.encoder.state_dict())
    scale = facts["temperature"] if facts["chosen_by"] == BY_SLIDES else None
    state |= {f"fc.{name}": value / (scale or 1.0) for name, value in network.head.state_dict().items()}
    known = {name: facts[name] for name in ("held_out_loss", "held_out_accuracy")} | {"temperature": scale}
    save_encoder(folder / FOLDER, state, replace(card, step=facts["steps"], metrics=known))


def keep_best(cells: Sequence[Path]) -> Path | None:
    """Remove every classifier but the best of those that ``keep`` left in the cells; its folder, None where there is
    none. The first one where nothing was held out."""
    held = [(_loss(cell / FOLDER), cell / FOLDER) for cell in cells if (cell / FOLDER).is_dir()]
    if not held:
        return None
    _, best = min(held, key=lambda one: one[0])
    for _, folder in held:
        if folder != best:
            shutil.rmtree(folder)
    return best


def _loss(folder: Path) -> float:
    try:
        loss = parse_json((folder / "card.json").read_text(encoding="utf-8"))["metrics"]["held_out_loss"]
    except (OSError, ValueError, KeyError, TypeError):  # killed while it was written: its cell is done again
        return float("inf")
    return float("inf") if loss is None else float(loss)
