"""What an evaluation may look at: the honest protocol, and the one that the method's authors used.

The second is here to stand beside their table. It differs in exactly three ways, one field each; a result that was
made by it says so wherever it is shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ProtocolName = Literal["honest", "original"]


@dataclass(frozen=True)
class Protocol:
    """How labels are drawn and how a model is chosen."""

    name: ProtocolName
    replacement: bool
    """Whether a labelled tile may be drawn more than once, whatever its slide."""
    holds_out: bool
    """Whether a share of the labelled tiles is kept from training, where there is something to choose."""
    selects_on_test: bool
    """Whether the test tiles choose the epoch, and the strength where one is chosen, instead of those held out."""

    @property
    def statement(self) -> str:
        """One line to stand under a table; empty for the honest protocol."""
        return "" if self is HONEST else ORIGINAL_STATEMENT


def describe_draw(protocol: Protocol, by_slide: bool) -> str:
    """What labelled tiles were drawn by, in the words of every table, JSON and run."""
    if protocol.replacement:
        return "tile, with replacement"
    return "slide or patient" if by_slide else "tile"


HONEST = Protocol("honest", replacement=False, holds_out=True, selects_on_test=False)
ORIGINAL = Protocol("original", replacement=True, holds_out=False, selects_on_test=True)
PROTOCOLS: dict[ProtocolName, Protocol] = {"honest": HONEST, "original": ORIGINAL}
ORIGINAL_STATEMENT = (
    "protocol original: labelled tiles were drawn with replacement, none were held out, and the test tiles chose the "
    "model. These numbers are above what new tiles would give; they are for comparison with the authors' table alone."
)
