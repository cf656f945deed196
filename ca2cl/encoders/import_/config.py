"""Settings of ``ca2cl encoders import``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from annotated_types import Ge, Interval

from ca2cl.common.ranges import check_ranges
from ca2cl.config import TrackingConfig
from ca2cl.errors import InputError
from ca2cl.registry.versions import ENCODER_NAME

POSITIONAL = ("source",)
_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Register an encoder from elsewhere.

    It gets a run of its own (kind import) and a card with its origin. The same weights for tiles of the same size are
    registered only once: importing them again prints the existing version.
    """

    source: str
    """timm:NAME.TAG, hf-hub:ORG/NAME, torchvision:IMAGENET1K_V1, a safetensors, .pth, .bin or .tar file, a run folder,
    or any other form that --encoder takes."""
    name: str = ENCODER_NAME
    """Registered model that gets the encoder as a new version."""
    arch: str | None = None
    """Architecture, as model.arch; none uses the card's or the source's, or resnet18 where neither states one."""
    input_size: int | None = None
    """Side in pixels of its input tiles; none uses the card's or the source's, or 224 where neither states one."""
    mean: tuple[float, float, float] | None = None
    """Mean of the red, green and blue of its input, in [0, 1], for a source that states none; with std. none: the
    source's, or ImageNet's."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of the red, green and blue of its input, for a source that states none; with mean."""
    mpp: float | None = None
    """Micrometres a pixel of the tiles that the weights are for, for a source that states none."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow store to register it in. Use --name instead of register_as."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InputError(f"name is {self.name!r}: use letters, digits, . - and _")
        check_ranges(self, input_size=Ge(32), mpp=Interval(gt=0, lt=math.inf))
        if (self.mean is None) != (self.std is None):
            given, other = ("mean", "std") if self.std is None else ("std", "mean")
            raise InputError(f"{given} is {_listed(getattr(self, given))}: needs --{other} R G B as well")
        if self.mean is not None and not all(0 <= one <= 1 for one in self.mean):
            raise InputError(f"mean is {_listed(self.mean)}: use numbers from 0 to 1 (of 255 levels, divide by 255)")
        if self.std is not None and not all(0 < one <= 1 for one in self.std):
            raise InputError(f"std is {_listed(self.std)}: use numbers above 0, up to 1 (of 255 levels, divide by 255)")


def _listed(numbers: Sequence[float]) -> str:
    return " ".join(f"{one:g}" for one in numbers)
