"""Evaluation protocols: honest, and the authors' own.

The second is here to stand beside their tables. Their two tasks differ: the linear probe keeps the epoch that is most
accurate on the test tiles; fine-tuning keeps the one that is most accurate on a fifth of the training tiles, split off
before labels are drawn, and predicts the test tiles once. A result that was made by either says so wherever it is
shown. ``evaluation.original`` has their settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ProtocolName = Literal["honest", "original"]


@dataclass(frozen=True)
class Protocol:
    """Rules by which labels are drawn and a model is chosen."""

    name: ProtocolName
    replacement: bool
    """A labelled tile may be drawn more than once, whatever its slide."""
    holds_out: bool
    """A share of the labelled tiles is kept from training, where there is something to choose."""
    selects_on_test: bool
    """The test tiles choose the epoch instead of those held out."""
    splits_first: bool = False
    """A share of all training tiles is split off before labels are drawn from the others, and chooses."""
    statement: str = ""
    """One line to stand under a table; empty for the honest protocol."""


def describe_draw(protocol: Protocol, by_slide: bool) -> str:
    """Unit that labelled tiles were drawn by, in the words of every table, JSON and run."""
    if protocol.replacement:
        return "tile, with replacement"
    return "slide or patient" if by_slide else "tile"


ORIGINAL_STATEMENT = (
    "protocol original: labelled tiles were drawn with replacement, none were held out, and the test tiles chose the "
    "model. These numbers are above what new tiles would give; they are for comparison with the authors' table alone."
)
TUNING_STATEMENT = (
    "protocol original: a fifth of the training tiles was split off, labelled tiles were drawn with replacement from "
    "the others, and the epoch most accurate on that fifth was kept; the test tiles were predicted once. The fifth's "
    "labels are not in the budget; these numbers are for comparison with the authors' table alone."
)
HONEST = Protocol("honest", replacement=False, holds_out=True, selects_on_test=False)
ORIGINAL = Protocol(
    "original", replacement=True, holds_out=False, selects_on_test=True, statement=ORIGINAL_STATEMENT
)  # fmt: skip
"""Their linear probe."""
ORIGINAL_TUNING = Protocol(
    "original", replacement=True, holds_out=False, selects_on_test=False, splits_first=True,
    statement=TUNING_STATEMENT,
)  # fmt: skip
"""Their fine-tuning."""
PROTOCOLS: dict[ProtocolName, Protocol] = {"honest": HONEST, "original": ORIGINAL}
"""Of a linear probe."""
