"""Names of encoders and baselines on the screen."""

from __future__ import annotations

import re

COLOUR, RANDOM, IMAGENET = "colour alone", "random weights", "ImageNet weights"
_BASELINES = {
    "colour histogram": COLOUR,
    "random encoder": RANDOM,
    "random": RANDOM,
    "ImageNet encoder": IMAGENET,
    "torchvision:IMAGENET1K_V1": IMAGENET,
}
_LONGEST = 24
_RUN_ID = re.compile("[0-9a-f]{32}")


def baseline(name: str) -> str:
    """A baseline in the words of a sentence, whatever its tokens; empty for any other encoder."""
    return _BASELINES.get(name.partition(" (")[0], "")


def short(name: str) -> str:
    """A name that fits a narrow table: eight digits of a run id, the end of a path."""
    if _RUN_ID.fullmatch(name):
        return name[:8]
    return name if len(name) <= _LONGEST else f"...{name[3 - _LONGEST :]}"
