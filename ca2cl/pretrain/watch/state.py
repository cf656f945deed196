"""State of a run's watches, which checkpoints carry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ca2cl.common.records import Count, DamagedRecord, Number, json_line, parse_record

STATE = "watch"
"""Its name in a checkpoint's state."""


@dataclass(frozen=True)
class WatchState:
    """What the watches up to a step amount to.

    Attributes:
        identity: of the tiles and the metric; others begin a new count.
        best_step: optimizer steps of the best encoder, 0: none yet.
        best_value: its number.
        card: its card, as ``card.json`` has it.
        collapsed: watches in a row, the last one among them, that found the features collapsed.
        reason: for the last of these.
        warned: whether a collapse has been reported.
    """

    identity: str = ""
    best_step: Count = 0
    best_value: Number = 0.0
    card: dict[str, Any] = field(default_factory=dict)
    collapsed: Count = 0
    reason: str = ""
    warned: bool = False

    @classmethod
    def of(cls, state: Mapping[str, Any], identity: str) -> WatchState:
        """The one in a checkpoint's state; a new one if there is none, or of other tiles or another metric."""
        try:
            found = parse_record(json_line(state.get(STATE, {})), cls, "state.json", "")
        except DamagedRecord:
            return cls(identity)
        return found if found.identity == identity else cls(identity)

    def after(self, collapse: str) -> WatchState:
        """The state after a watch that found the features collapsed, or not (empty)."""
        return replace(self, collapsed=self.collapsed + 1 if collapse else 0)

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint's state."""
        return asdict(self)
