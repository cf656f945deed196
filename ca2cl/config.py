"""Settings that several verbs share: validated frozen dataclasses.

The field names are a contract: programs set them as ``--group.field value`` or in YAML.
Settings of the other verbs stand beside the code that reads them; they follow the same form.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from annotated_types import Ge, Gt, Interval

from ca2cl.common.mlflow_names import check_experiment, check_model_name, check_run_name, check_tracking_uri
from ca2cl.common.redact import redact_all
from ca2cl.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def require(holds: bool, name: str, value: object, remedy: str) -> None:
    """Refuse a setting unless ``holds``.

    Args:
        holds: the condition.
        name: dotted name of the setting.
        value: its value.
        remedy: what to use instead.

    Raises:
        InputError: it does not.
    """
    if not holds:
        raise InputError(f"{name} is {value!r}: {remedy}")


_BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "ge": ("{} or more", operator.ge), "gt": ("more than {}", operator.gt),
    "le": ("up to {}", operator.le), "lt": ("below {}", operator.lt),
}  # fmt: skip


def check_ranges(config: object, group: str = "", **ranges: Ge | Gt | Interval) -> None:
    """Compare settings with their ranges; of a tuple every value. None is in any range.

    Raises:
        InputError: one is outside of its range.
    """
    for name, bounds in ranges.items():
        given = getattr(config, name)
        values = given if isinstance(given, tuple) else (given,)
        limits = [(*_BOUNDS[kind], limit) for kind in _BOUNDS if (limit := getattr(bounds, kind, None)) is not None]
        inside = all(value is None or holds(value, limit) for value in values for _, holds, limit in limits)
        remedy = ", ".join(words.format(limit) for words, _, limit in limits)
        require(inside, f"{group}.{name}" if group else name, given, f"use {remedy}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tiles come from and in which order."""

    shards: str = ""
    """Folder or URL that ``ca2cl shard`` wrote: tars, index and manifest."""
    image_size: int = 224
    """Side in pixels of the views that the encoder sees."""
    lanes: int = 64
    """Number of parallel reading positions. Fixes the content of every batch; must be a multiple of the number of
    processes and divide run.batch_size."""
    workers: int = 2
    """Decoding processes for each training process; 0 decodes in the training process. Never changes a result."""
    cache_dir: str | None = None
    """Local folder in which remote shards are kept. Needed for remote shards only."""
    cache_gb: float | None = None
    """Most disk space, in 10^9 bytes, that the shards in data.cache_dir take; those opened longest ago make room. Two
    shards for each lane that this machine serves are enough. None keeps them all."""
    fetch_timeout: float = 60.0
    """Seconds without a byte of a remote file after which it is asked for again."""
    max_bad_rate: float = 0.01
    """The run stops when more than this share of the samples read so far could not be decoded."""

    def __post_init__(self) -> None:
        check_ranges(
            self, "data", image_size=Ge(32), lanes=Ge(1), workers=Ge(0), cache_gb=Gt(0), fetch_timeout=Gt(0),
            max_bad_rate=Interval(ge=0, le=1),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The encoder and its heads."""

    arch: str = "resnet18"
    """Backbone, without its classifier: resnet18, resnet34, resnet50; timm/NAME for one of timm's, such as
    timm/vit_tiny_patch16_224; package.module:builder for one of your own code."""
    weights: str = "random"
    """Where the backbone starts: random, torchvision:IMAGENET1K_V1, or anything the encoder resolver takes."""
    norm: Literal["sync", "frozen", "lane_group"] = "sync"
    """Whose samples a BatchNorm's statistics are taken over. sync: one forward pass's samples on all processes, which
    with micro-batches are those of one micro-batch: run.accumulation must then be plain; frozen: the running
    statistics, never updated; lane_group: fixed groups of lanes, the same on any hardware. A backbone without BatchNorm
    (a ViT) needs none of them: its micro-batches are exact."""
    norm_group: int = 16
    """Tiles in a group of lane_group normalisation."""
    norm_block: int = 4
    """Groups that make up a block of lane_group normalisation. A tile's two views have 1 / norm_block of their groups'
    tiles in common, which helps to tell the pair apart without a look at it; 1: both views have the same groups, as
    under a BatchNorm of each GPU's own. A batch, and what a process holds of it at a time, must be whole blocks of
    norm_block * norm_group tiles. Runs begun before this setting existed have 2."""
    projection_dim: int = 128
    """Outputs of the projector and of the group head."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of the input's channels, in [0, 1], subtracted before the encoder."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of the input's channels, divided by before the encoder."""

    def __post_init__(self) -> None:
        check_ranges(self, "model", projection_dim=Ge(2), norm_group=Ge(2), norm_block=Ge(1), std=Gt(0))


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """How a tile becomes its two views."""

    recipe: Literal["ca2cl", "crop"] = "ca2cl"
    """ca2cl: the paper's strong and weak views; crop: two random resized crops, for training from scratch."""
    strength: float = 1.0
    """Multiplies the colour and stain jitter of the crop recipe."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest share of the tile's area that a view of the crop recipe covers."""

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        require(0 < low <= high <= 1, "views.crop_scale", self.crop_scale, "use 0 < smallest <= largest <= 1")
        check_ranges(self, "views", strength=Ge(0))


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The loss: NT-Xent + cluster loss, and NT-Xent again under an adversarial stem (CA2CL, JBHI 2025)."""

    temperature: float = 0.2
    """Temperature T of NT-Xent."""
    clusters: int = 10
    """Number of k-means clusters K in a batch."""
    cluster_weight: float = 0.1
    """Weight of the cluster loss; 0 leaves it out."""
    cluster_temperature: float = 0.2
    """Temperature of the cluster loss's softmax over centroids."""
    lloyd_iterations: int = 10
    """Lloyd iterations of k-means."""
    mutual_information: float = 0.0
    """Weight of the mutual-information term between the two views' soft assignments; 0 leaves it out."""
    adversary: bool = True
    """Whether the adversarial branch is computed."""
    epsilon: float = 1.0
    """Size of the adversarial step on the stem's weight."""
    epsilon_mode: Literal["absolute", "relative"] = "absolute"
    """absolute: the step's norm is epsilon; relative: epsilon times the norm of the stem's weight."""

    @property
    def least_tiles(self) -> int:
        """Fewest tiles that the loss takes: k-means needs one for each cluster."""
        return self.clusters if self.cluster_weight or self.mutual_information else 2

    def __post_init__(self) -> None:
        check_ranges(
            self, "objective", temperature=Gt(0), cluster_temperature=Gt(0), clusters=Ge(2), cluster_weight=Ge(0),
            lloyd_iterations=Ge(1),
        )  # fmt: skip
        require(
            self.epsilon > 0, "objective.epsilon", self.epsilon, "use a positive number, or --objective.adversary false"
        )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: Literal["adam", "adamw", "sgd", "sgd_plain", "lars"] = "adam"
    """adam: L2 penalty inside the gradient, as the paper; adamw: decoupled decay; sgd: Nesterov momentum; sgd_plain:
    momentum without Nesterov's look ahead; lars: large batches (You et al., 2017), biases and BatchNorm excluded from
    decay and adaptation."""
    lr: float = 6e-4
    """Peak learning rate."""
    weight_decay: float = 1e-4
    """L2 penalty or decay."""
    momentum: float = 0.9
    """Momentum of sgd and lars; first beta of adam and adamw."""
    schedule: Literal["cosine_epoch", "cosine_step", "cosine_restarts", "constant"] = "cosine_epoch"
    """cosine_epoch: half a cosine to 0, changed once an epoch, as the paper; cosine_step: changed every step;
    cosine_restarts: half a cosine again and again (SGDR), changed once an epoch."""
    restart_epochs: int = 5
    """Epochs from one restart of cosine_restarts to the next."""
    warmup_steps: int = 0
    """Steps over which the rate rises linearly from 0 before the schedule starts."""
    clip_norm: float | None = None
    """Largest norm of the whole gradient; none leaves it alone."""

    def __post_init__(self) -> None:
        check_ranges(
            self, "optim", lr=Gt(0), weight_decay=Ge(0), momentum=Interval(ge=0, lt=1), warmup_steps=Ge(0),
            restart_epochs=Ge(1), clip_norm=Gt(0),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Size, length and folder of the run."""

    output_dir: str = ""
    """The run's folder: journal, configuration, checkpoints."""
    batch_size: int = 256
    """Tiles in one optimizer step, over all processes and micro-batches."""
    micro_batch_size: int | None = None
    """Tiles that one process holds at a time; none takes its whole share of the batch at once."""
    accumulation: Literal["exact", "plain", "bitwise"] = "exact"
    """What micro-batches mean. exact: the result of the whole batch, to rounding; plain: the mean of the micro-batches'
    own results, negatives only within one; bitwise: exact, and the same to the last bit on any number of processes and
    micro-batches, in units of a block of model.norm_block * model.norm_group tiles (slower). exact and bitwise refuse
    micro-batches under model.norm sync, whose statistics would be each micro-batch's own. Under bitwise
    every process computes on one CPU thread, and a run goes on only on a machine of its kind."""
    epochs: int | None = None
    """Length of the run in passes over the data. Give this or run.steps."""
    steps: int | None = None
    """Length of the run in optimizer steps. Give this or run.epochs."""
    seed: int = 0
    """Seed of the initial weights, the order and the views."""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """Autocast precision of the encoder and heads; the losses are always computed in fp32."""
    tf32: bool = False
    """Whether a GPU rounds the inputs of fp32 convolutions and matrix products to TF32: faster with precision no."""
    checkpoint_every: int = 1000
    """Optimizer steps between checkpoints; one is always written at the end."""
    keep_last: int = 2
    """Number of newest checkpoints to keep."""
    keep_every: int | None = None
    """Optimizer steps: checkpoints of every so many are kept for good, too; none keeps just the newest."""
    log_every: int = 1
    """Optimizer steps between journal lines."""
    figures_every: int = 5
    """Epochs between figures of the curves and of the clusters; 0 draws them only at the end."""
    resume: str = "auto"
    """auto: go on from the newest checkpoint in run.output_dir if there is one, with the settings of its run; never:
    refuse a used folder; or the path of a checkpoint to begin from, in a new run.output_dir also with other settings:
    the same command again goes on from what it has itself written since."""
    max_skipped: int = 20
    """Steps in a row that may be skipped for a non-finite loss or gradient before the run stops."""

    def __post_init__(self) -> None:
        check_ranges(
            self, "run", batch_size=Ge(2), micro_batch_size=Ge(2), epochs=Ge(1), steps=Ge(1), checkpoint_every=Ge(1),
            keep_last=Ge(1), log_every=Ge(1), max_skipped=Ge(1), keep_every=Ge(1), figures_every=Ge(0),
            seed=Interval(ge=0, lt=2**31),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where the numbers and the encoder go."""

    uri: str | None = None
    """MLflow tracking URI; none takes MLFLOW_TRACKING_URI, or else an embedded SQLite store under tracking.root."""
    root: str = "ca2cl-runs"
    """Folder of the embedded store: database and artifacts side by side."""
    experiment: str = "ca2cl"
    """MLflow experiment."""
    run_name: str | None = None
    """Name of the run; none takes the output folder's name."""
    register_as: str | None = "ca2cl-encoder"
    """Registered model that the finished encoder (fine-tuning: the best classifier) becomes a version of; none
    registers nothing."""
    sinks: tuple[str, ...] = ()
    """Metrics trackers beside MLflow that get the journal's lines, too: module:Class of your own
    (docs/architecture.md)."""

    def __post_init__(self) -> None:
        check_experiment("tracking.experiment", self.experiment)
        check_run_name("tracking.run_name", self.run_name or "")
        if self.register_as is not None:
            check_model_name("tracking.register_as", self.register_as)
        if self.uri:
            check_tracking_uri("tracking.uri", self.uri)


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested plain dictionaries."""
    return dataclasses.asdict(config)


def flatten(config: Any) -> dict[str, str | int | float | bool | None]:
    """A configuration as ``{"group.field": value}``, to be written down: lists and tuples become their JSON, and
    secrets in URIs are taken out."""
    flat: dict[str, str | int | float | bool | None] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(f"{prefix}.{name}" if prefix else name, inner)
        else:
            flat[prefix] = json.dumps(value) if isinstance(value, (list, tuple)) else value

    walk("", redact_all(to_dict(config)))
    return flat


def digest(config: Any) -> str:
    """SHA-256 of a configuration's canonical JSON, as 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()
