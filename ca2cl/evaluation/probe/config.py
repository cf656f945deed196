"""The settings of ``ca2cl probe``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from annotated_types import Ge, Interval

from ca2cl.common.ranges import check_ranges
from ca2cl.config import Pooled, TrackingConfig
from ca2cl.errors import InputError
from ca2cl.evaluation.protocol import ProtocolName
from ca2cl.evaluation.splits import check_budgets


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Evaluate frozen features of an encoder with classifiers at several label budgets, beside baselines."""

    encoder: str
    """Run id or its first digits, version number, alias (champion, latest), models:/NAME/VERSION, run folder,
    .safetensors file, timm:NAME.TAG, hf-hub:ORG/NAME, torchvision:IMAGENET1K_V1 or random."""
    train: str
    """Shards of labelled tiles."""
    test: tuple[str, ...] | str
    """Shards of test tiles, one set or several, such as stain-normalised and not. Their classes must be among those of
    train. With the honest protocol they choose nothing. `encoders promote` uses the first set."""
    against: tuple[str, ...] = ()
    """Other encoders, named in the same ways, to probe on the same draws and tiles and to compare tile by tile."""
    tokens: tuple[Pooled, ...] = ()
    """Features of a ViT: class (its class token), mean (the mean of its patch tokens), both (one after the other), or
    several of these as rows of one table, of which the first is compared with all others. [] uses each encoder's own
    pooling. `encoders compare` and `promote` compare runs with the same tokens only."""
    labels: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Label budgets: up to 1, a fraction of each class's tiles; above 1, a number of tiles for each class."""
    seeds: int = 5
    """Number of random draws of labelled tiles for every budget: seeds 0, 1, and so on."""
    draw_by: Literal["auto", "tile"] = "auto"
    """How labelled tiles are drawn. auto: slide by slide (or patient by patient) if the training shards name them (a
    tile without a name counts as a slide of its own), so that few labels are those of few slides, as in a clinic;
    otherwise tile by tile. tile: always tile by tile."""
    classifiers: tuple[Literal["logistic", "sgd", "knn"], ...] = ("logistic", "sgd", "knn")
    """Classifiers. logistic: logistic regression, the rows "linear"; sgd: a linear layer trained by SGD with a cosine
    that restarts every 5 epochs, "linear SGD"; knn: nearest neighbours by cosine, "k-NN". All use features minus the
    mean of the labelled tiles, scaled to unit length."""
    knn: int = 20
    """Number of neighbours of k-NN."""
    strength: float | Literal["auto"] | None = None
    """C of the logistic regression: scikit-learn's inverse regularisation strength, on centred features of unit length.
    auto: chosen on held-out labelled tiles (whole slides or patients if they are known). none: auto if slides are
    known, otherwise 1.0, scikit-learn's default, because held-out tiles of training slides reward a classifier for
    telling slides apart and would choose a large C."""
    sgd_epochs: int = 50
    """Epochs of the SGD, in multiples of 5; more if few tiles are labelled, to reach 200 steps. A fifth of the labelled
    tiles (whole slides if they are known) is held out to choose the epoch, if that is 15 tiles or more."""
    sgd_lr: float = 3.0
    """Peak learning rate of the SGD, on centred features of unit length."""
    calibrate: bool = True
    """Choose a temperature for the probabilities of logistic regression and k-NN on held-out labelled tiles (whole
    slides or patients if they are known), which takes up to five more fits for each; the SGD has held-out tiles
    anyway. Protocol original holds out nothing, so there is no temperature."""
    protocol: ProtocolName = "honest"
    """honest, or original: as in the linear probe of the method's authors, labelled tiles are drawn with replacement,
    none are held out, and the test tiles choose the epoch of the SGD. The authors also train on augmented tiles with
    BatchNorm in train mode, which frozen features do not allow: see `ca2cl finetune --trains head --protocol original`.
    The result is marked, is not compared with results of the honest protocol, and promotes no encoder."""
    center: str | None = None
    """Medical centre or scanner of a tile: a regular expression that finds it in the tile's path below the source or in
    its slide or patient (its first group, if any); a column: group, or vendor or mpp of tiles cut from slides; a CSV
    with the columns center and key, path, slide or group; or set, by which every test set is a centre. Adds the
    robustness indices RI, MaRI and CRoMa, the accuracy in each centre, and a probe of the centre itself."""
    slide_probe: bool = False
    """Also probe how well a tile's slide or patient is predicted from the features, tiles held out within slides."""
    shifts: bool = False
    """Also score the first test set's tiles with shifted stains, scanner, JPEG compression and blur, at three strengths
    each: twelve more passes of every encoder over these tiles."""
    batch_size: int = 256
    """Tiles in a forward pass of the encoder."""
    workers: int = 2
    """Decoding processes; 0 decodes in the main process."""
    image_size: int | None = None
    """Side in pixels that tiles are resized to; none uses that of each encoder."""
    cache_dir: str | None = None
    """Local folder that caches remote shards; needed for remote shards only."""
    output: str | None = None
    """JSON file of all results; none uses probe-<run>-<data>.json in tracking.root."""
    details: bool = False
    """Print the long tables, too: all metrics, differences, recalls, calibration. They are always in
    NAME-details.txt."""
    floors: bool = True
    """Also probe the baselines: colour histograms, and the same architecture with random and with ImageNet weights."""
    imagenet: bool = True
    """Include ImageNet weights in the baselines. torchvision downloads them once; without a network they are
    omitted."""
    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:N."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow store of the encoder and of the result."""

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
        if self.shifts and not {"logistic", "sgd"} & set(self.classifiers):
            raise InputError(
                "shifts is true: k-NN is not scored on shifted tiles; add logistic or sgd to classifiers, or set it to "
                "false"
            )
        if self.shifts and self.protocol == "original":
            raise InputError("shifts is true: protocol original is for comparison only; use honest, or set it to false")
        if isinstance(self.strength, float | int) and not 0 < self.strength < float("inf"):
            raise InputError(f"strength is {self.strength!r}: use a positive number or auto")
        self._check_names()

    def _check_names(self) -> None:
        if not all(self.tests) or not self.tests:
            raise InputError("test is empty: give at least one folder or URL of shards")
        for name, given in (("test", self.tests), ("classifiers", self.classifiers), ("tokens", self.tokens)):
            if len(set(given)) < len(given):
                raise InputError(f"{name} names one twice: {', '.join(given)}; give each once")
        if not self.classifiers:
            raise InputError("classifiers is empty: give at least one of logistic, sgd, knn")
        if len({self.encoder, *self.against}) < len(self.against) + 1:
            raise InputError(f"against names one encoder twice, or the encoder itself: {', '.join(self.against)}")
