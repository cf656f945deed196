"""The best encoder so far, in the run's folder ``best``.

Every checkpoint holds a link to its weights, and its card in the state. A run that goes on from a checkpoint so finds
the encoder that was the best one then, whatever was written since.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ca2cl.common.files import file_digest, fsync, link, writing
from ca2cl.common.records import json_line, parse_json
from ca2cl.models.encoder_card import CARD_NAME, WEIGHTS_NAME, EncoderCard
from ca2cl.models.encoder_io import save_encoder
from ca2cl.pretrain.watch.state import WatchState
from ca2cl.runtime.tensor_files import Whole
from ca2cl.training.checkpoint import BEST_NAME, read_state

BEST_PATH = "best"
_REMEDY = "free some space and start again: the run goes on from its newest checkpoint"


class BestEncoder:
    """Writes and restores the folder.

    Args:
        run_dir: the run's.
    """

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / BEST_PATH

    @property
    def weights(self) -> Path:
        """The file of its weights."""
        return self.folder / WEIGHTS_NAME

    def write(self, weights: Mapping[str, Whole], card: EncoderCard) -> dict[str, Any]:
        """Replace the folder's encoder. Returns the card as it is in the file.

        Raises:
            InputError: it cannot be written.
        """
        temporary = self._temporary()
        with writing(self.folder, _REMEDY):
            save_encoder(temporary, weights, card)
            self._take(temporary)
        written: dict[str, Any] = parse_json(json_line(asdict(card)))
        return written

    def restore(self, state: WatchState, checkpoint: Path | None) -> None:
        """Make the folder that of a checkpoint's state; none if that knows no best encoder.

        Raises:
            InputError: it cannot be written.
        """
        with writing(self.folder, _REMEDY):
            if state.best_step == 0 or checkpoint is None:
                shutil.rmtree(self.folder, ignore_errors=True)
                return
            if self._holds(state, checkpoint):
                return
            temporary = self._temporary()
            temporary.mkdir()
            link(checkpoint / BEST_NAME, temporary / WEIGHTS_NAME)
            (temporary / CARD_NAME).write_bytes(json_line(state.card))
            self._take(temporary)

    def _holds(self, state: WatchState, checkpoint: Path) -> bool:
        with suppress(OSError, ValueError, KeyError):
            card = parse_json((self.folder / CARD_NAME).read_bytes())
            same = file_digest(self.weights) == read_state(checkpoint)["sha256"][BEST_NAME]
            return bool(same and card["step"] == state.best_step)
        return False

    def _temporary(self) -> Path:
        temporary = self.folder.with_name(f".{BEST_PATH}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        return temporary

    def _take(self, temporary: Path) -> None:
        """Bring the new folder to its place; a run that is killed in between restores it at its next start."""
        for file in temporary.iterdir():
            fsync(file)
        shutil.rmtree(self.folder, ignore_errors=True)
        temporary.rename(self.folder)
        fsync(self.folder.parent)
