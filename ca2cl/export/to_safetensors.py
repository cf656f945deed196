"""Export to a folder that every verb takes as ``--encoder``.

A folder and not a file, because the card must stay with the weights: without it size and normalisation are guesses.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from safetensors.torch import save

from ca2cl.common.records import json_line
from ca2cl.export.target import Features, Target, behind_normalisation, plain_state
from ca2cl.models.backbone import Backbone
from ca2cl.models.encoder_io import CARD_NAME, WEIGHTS_NAME, EncoderCard, load_encoder


class Safetensors(Target):
    """A folder of weights and card."""

    name, package = "safetensors", "ca2cl"

    def build(self, encoder: Backbone, card: EncoderCard, out: Path) -> dict[str, bytes]:
        return {
            f"{out.name}/{CARD_NAME}": json_line(asdict(replace(card, predicts=()))),  # without a head
            f"{out.name}/{WEIGHTS_NAME}": save(plain_state(encoder), metadata={"format": "pt"}),
        }

    def native(self, path: Path, card: EncoderCard) -> Features:
        encoder, read = load_encoder(path)
        return behind_normalisation(encoder, read)

    def snippet(self, path: Path, card: EncoderCard) -> str:
        return (
            "import ca2cl\n"
            f"model = ca2cl.load_encoder({str(path)!r})\n"
            "# model(model.transform(tile)[None]) are the features of a tile: a PIL image, or uint8 (H, W, 3)\n"
        )


SAFETENSORS = Safetensors()
