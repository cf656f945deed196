"""The settings of ``ca2cl probe``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from annotated_types import Ge, Interval

from ca2cl.config import TrackingConfig, check_ranges
from ca2cl.errors import InputError
from ca2cl.evaluation.protocol import ProtocolName
from ca2cl.evaluation.splits import check_budgets


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """A probe of frozen features."""

    encoder: str
    """Run id or its first digits, version number, alias (champion, latest), models:/NAME/VERSION, run folder,
    .safetensors file, torchvision:IMAGENET1K_V1 or random."""
    train: str
    """Shards with the labelled tiles."""
    test: tuple[str, ...] | str
    """Shards with the test tiles, one set or several beside one another, such as stain-normalised and not; their
    classes must be among those of train. By the honest protocol never used to choose. An encoder is promoted by the
    first."""
    against: tuple[str, ...] = ()
    """Other encoders, named in the same ways, that are probed on the same draws and tiles and that the first one is
    compared with tile by tile."""
    labels: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Label budgets: a fraction of each class's tiles up to 1, or a whole number of tiles a class above 1."""
    seeds: int = 5
    """Draws of the labelled tiles for every budget: seeds 0, 1, and so on."""
    draw_by: Literal["auto", "tile"] = "auto"
    """How labelled tiles are drawn. auto: slide by slide (or patient by patient) where the training shards name them (a
    tile without one is a slide of its own), so that few labels are those of few slides, as in a clinic; else tile by
    tile. tile: tile by tile in any case."""
    classifiers: tuple[Literal["logistic", "sgd", "knn"], ...] = ("logistic", "sgd", "knn")
    """What reads the features. logistic: logistic regression, the rows "linear"; sgd: a linear layer trained by SGD
    with a cosine that starts again every 5 epochs, "linear SGD"; knn: the nearest neighbours by cosine, "k-NN". All
    read features less the labelled tiles' mean, scaled to unit length."""
    knn: int = 20
    """Neighbours that vote."""
    strength: float | Literal["auto"] | None = None
    """C of the logistic regression, scikit-learn's inverse L2 strength, on centred features of unit length; or auto:
    chosen on held-out labelled tiles, whole slides or patients where they are known. None takes auto where
    they are known, and scikit-learn's default, 1.0, where not: held-out tiles of slides that are trained on reward a
    classifier for telling slides apart, and choose a large C."""
    sgd_epochs: int = 50
    """Passes of the SGD over its tiles, in whole turns of 5; more where few are labelled, for 200 steps. A fifth of the
    labelled tiles, whole slides where they are known, is held out and decides which epoch's weights are taken, where
    that is 15 tiles or more."""
    sgd_lr: float = 3.0
    """Peak learning rate of the SGD, on centred features of unit length."""
    protocol: ProtocolName = "honest"
    """original: labelled tiles are drawn with replacement, none are held out, and the test tiles choose the epoch of
    the SGD, as in the linear probe of the method's authors. They train on augmented tiles with BatchNorm in train mode,
    which frozen features cannot be: `ca2cl finetune --trains head --protocol original` does all of it. The result says
    so, is compared with none by the honest protocol, and promotes no encoder."""
    batch_size: int = 256
    """Tiles that go through the encoder at once."""
    workers: int = 2
    """Decoding processes; 0 decodes in this one."""
    image_size: int | None = None
    """Side in pixels that tiles are resized to; none takes each encoder's own."""
    cache_dir: str | None = None
    """Local folder in which remote shards are kept. Needed for remote shards only."""
    output: str | None = None
    """JSON file with every number; none takes probe-<run>-<data>.json under tracking.root."""
    floors: bool = True
    """Also probe what any encoder must beat: colour histograms, and the same architecture with random and with ImageNet
    weights."""
    imagenet: bool = True
    """Whether ImageNet weights are among the floors. torchvision downloads them the first time; where it cannot, the
    table goes without them."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the encoder is found and the result is logged."""

    @property
    def tests(self) -> tuple[str, ...]:
        """All test sets; the first is the one that counts."""
        return (self.test,) if isinstance(self.test, str) else self.test

    def __post_init__(self) -> None:
        check_budgets(self.labels)
        check_ranges(
            self, seeds=Ge(1), knn=Ge(1), sgd_epochs=Ge(1), batch_size=Ge(1), workers=Ge(0), image_size=Ge(32),
            sgd_lr=Interval(gt=0, lt=math.inf),
        )  # fmt: skip
        if self.strength == "auto" and self.protocol == "original":
            raise InputError("strength is 'auto': protocol original holds out nothing to choose it by; give a number")
        if isinstance(self.strength, float | int) and not 0 < self.strength < float("inf"):
            raise InputError(f"strength is {self.strength!r}: use a positive number or auto")
        self._check_names()

    def _check_names(self) -> None:
        if not all(self.tests) or not self.tests:
            raise InputError("test is empty: give at least one folder or URL of shards")
        for name, given in (("test", self.tests), ("classifiers", self.classifiers)):
            if len(set(given)) < len(given):
                raise InputError(f"{name} names one twice: {', '.join(given)}; give each once")
        if not self.classifiers:
            raise InputError("classifiers is empty: give at least one of logistic, sgd, knn")
        if len({self.encoder, *self.against}) < len(self.against) + 1:
            raise InputError(f"against names one encoder twice, or the encoder itself: {', '.join(self.against)}")
