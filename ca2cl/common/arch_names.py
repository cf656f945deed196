"""Spelling of the names that architectures and weights go by."""

from __future__ import annotations

TIMM = "timm:"
"""Beginning of the names of timm's models."""
HUB = "hf-hub:"
"""Beginning of the names of repositories on the Hugging Face hub."""
TORCHVISION = "torchvision:"
"""Beginning of the names of torchvision's weights."""
RANDOM = "random"
"""Untrained weights, or ``random:SEED``."""
OWN = (TIMM, HUB, TORCHVISION, f"{RANDOM}:")
"""Beginnings that are never a module's name, although they look like ``module:attribute``."""
_OLD_TIMM = "timm/"


def canonical_arch(arch: str) -> str:
    """``arch`` as this version spells it: ``timm/NAME``, in cards, runs and files of earlier versions, is
    ``timm:NAME``."""
    return TIMM + arch.removeprefix(_OLD_TIMM) if arch.startswith(_OLD_TIMM) else arch
