"""Settings that several verbs share: validated frozen dataclasses.

The field names are a contract: programs set them as ``--group.field value`` or in YAML.
Settings of the other verbs stand beside the code that reads them; they follow the same form.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from annotated_types import Ge, Gt, Interval

from ca2cl.common.arch_names import canonical_arch
from ca2cl.common.mlflow_names import check_experiment, check_model_name, check_run_name, check_tracking_uri
from ca2cl.common.ranges import check_ranges, require
from ca2cl.common.redact import redact_all

Pooling = Literal["default", "class", "mean", "both"]
Pooled = Literal["class", "mean", "both"]
"""Ways to pool the tokens of a ViT: its class token, the mean of its patch tokens, or one after the other."""
"""How a backbone pools its features over positions."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Tiles and their order."""

    shards: str = ""
    """Folder or URL that ``ca2cl shard`` wrote: tars, index and manifest."""
    image_size: int = 224
    """Side in pixels of the views that the encoder sees."""
    lanes: int = 64
    """Number of parallel reading positions. Determines the content of every batch. Must be a multiple of the number of
    processes and must divide run.batch_size."""
    workers: int = 2
    """Decoding processes for each training process; 0 decodes in the training process itself. Does not affect
    results."""
    max_per_slide: int | None = None
    """Most tiles of a slide or patient in a batch. The tiles of every slide are then spread over all batches of an
    epoch as evenly as possible. Of a slide with more than so many for each step of an epoch, the others wait for the
    next epochs. Tiles without a slide are not limited. A batch reads from all shards, so remote ones must fit into
    data.cache_dir. none: no limit, and each lane reads shard after shard."""
    cache_dir: str | None = None
    """Local folder that caches remote shards; needed for remote shards only."""
    cache_gb: float | None = None
    """Maximum size of data.cache_dir in 10^9 bytes; the shards opened longest ago are deleted first. Two shards for
    each lane that this machine serves are enough. none keeps all shards."""
    fetch_timeout: float = 60.0
    """Seconds without data after which the download of a remote file is retried."""
    max_bad_rate: float = 0.01
    """Largest share of samples that may fail to decode; above it the run stops."""

    def __post_init__(self) -> None:
        check_ranges(
            self, "data", image_size=Ge(32), lanes=Ge(1), workers=Ge(0), max_per_slide=Ge(1), cache_gb=Gt(0),
            fetch_timeout=Gt(0), max_bad_rate=Interval(ge=0, le=1),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The encoder and its heads."""

    arch: str = "resnet18"
    """Backbone, without its classifier: resnet18, resnet34 or resnet50; timm:NAME for a timm model, such as
    timm:vit_small_patch16_224; an installed package's name for a body; package.module:builder for your own code.
    timm:NAME,ARGUMENT=VALUE,... sets arguments of a timm model, such as init_values=1e-5,reg_tokens=4."""
    weights: str = "random"
    """Initial weights: random; timm:NAME.TAG; hf-hub:ORG/NAME; torchvision:IMAGENET1K_V1; a file of DINO, DINOv2,
    DINOv3, MoCo, timm, torchvision or lightly; or any other form that --encoder takes (see ca2cl probe). They must have
    every tensor of the backbone."""
    norm: Literal["sync", "frozen", "lane_group"] = "sync"
    """Samples that BatchNorm's statistics are computed over. sync: one forward pass on all processes; micro-batches
    then need run.accumulation plain. frozen: the running statistics, never updated. lane_group: fixed groups of lanes,
    the same on any hardware. A backbone without BatchNorm (a ViT) ignores this setting; its micro-batches are exact."""
    norm_group: int = 16
    """Tiles in a group, for lane_group."""
    norm_block: int = 4
    """Groups in a block, for lane_group. The groups of a tile's two views share 1 / norm_block of their tiles; the more
    they share, the more easily the network recognises a pair by the statistics alone. With 1 both views have the same
    groups, as under BatchNorm on each GPU separately. A batch, and the part of it that a process holds at a time, must
    consist of whole blocks of norm_block * norm_group tiles. Runs begun before this setting existed have 2."""
    pooling: Pooling = "default"
    """Pooling of the features over positions. default: the weights' or the body's own. class: the class token of a ViT.
    mean: the mean over patches. both: class token and mean, one after the other, which doubles the features."""
    projection_dim: int = 128
    """Outputs of the projector and of the group head."""
    mean: tuple[float, float, float] | None = None
    """Mean of the input channels, in [0, 1]; subtracted before the encoder. none: that of the weights where they state
    one, and else ImageNet's."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of the input channels; divides the input before the encoder. none: as for model.mean."""
    drop_path: float = 0.0
    """Drop path (stochastic depth): probability with which the last block leaves a tile out, rising linearly from 0 in
    the first one. For timm bodies that have it. Which tiles a block leaves out follows from run.seed, the epoch and the
    tile."""
    checkpoint_activations: bool = False
    """Keep only the input of each block for the backward pass, and compute the rest again: less memory, a fifth to a
    third more time, the same gradient."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "arch", canonical_arch(self.arch))
        check_ranges(
            self, "model", projection_dim=Ge(2), norm_group=Ge(2), norm_block=Ge(1), std=Gt(0),
            drop_path=Interval(ge=0, lt=1),
        )  # fmt: skip

    @property
    def normalisation(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Mean and standard deviation; ImageNet's where they are left open."""
        return self.mean or IMAGENET_MEAN, self.std or IMAGENET_STD


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """Augmentation: the two views of a tile."""

    recipe: Literal["ca2cl", "crop"] = "ca2cl"
    """ca2cl: the paper's strong and weak views; crop: two random resized crops, for training from scratch."""
    strength: float = 1.0
    """Factor on the colour and stain jitter of the crop recipe."""
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
    same_slide_weight: float = 1.0
    """Weight in NT-Xent's denominator of negatives of the anchor's own slide or patient. 1: as any other; 0: left out;
    between: counted less. For methods with NT-Xent; it needs shards with slides or patients."""
    clusters: int = 10
    """Number of k-means clusters K in a batch."""
    cluster_weight: float = 0.1
    """Weight of the cluster loss; 0 omits it."""
    cluster_temperature: float = 0.2
    """Temperature of the cluster loss's softmax over centroids."""
    lloyd_iterations: int = 10
    """Lloyd iterations of k-means."""
    mutual_information: float = 0.0
    """Weight of the mutual-information term between the two views' soft assignments; 0 omits it."""
    adversary: bool = True
    """Compute the adversarial branch."""
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
            lloyd_iterations=Ge(1), same_slide_weight=Interval(ge=0, le=1),
        )  # fmt: skip
        require(
            self.epsilon > 0, "objective.epsilon", self.epsilon, "use a positive number, or --objective.adversary false"
        )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: Literal["adam", "adamw", "sgd", "sgd_plain", "lars"] = "adam"
    """adam: L2 penalty inside the gradient, as in the paper; adamw: decoupled decay; sgd: Nesterov momentum; sgd_plain:
    momentum without Nesterov's look-ahead; lars: for large batches (You et al., 2017), with biases and BatchNorm
    excluded from decay and adaptation."""
    lr: float = 6e-4
    """Peak learning rate."""
    weight_decay: float = 1e-4
    """L2 penalty (adam, sgd) or decoupled decay (adamw)."""
    momentum: float = 0.9
    """Momentum of sgd and lars; first beta of adam and adamw."""
    schedule: Literal["cosine_epoch", "cosine_step", "cosine_restarts", "constant"] = "cosine_epoch"
    """cosine_epoch: half a cosine to 0, updated every epoch, as in the paper; cosine_step: updated every step;
    cosine_restarts: half a cosine that restarts (SGDR), updated every epoch."""
    restart_epochs: int = 5
    """Epochs between restarts, for cosine_restarts."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0 before the schedule starts."""
    clip_norm: float | None = None
    """Maximum norm of the whole gradient; none: no clipping."""
    layer_decay: float | None = None
    """Factor on the learning rate from one layer of the encoder to the one before it; heads have the full rate. 0.65 to
    0.9 continues from given weights without losing what their first layers know. none: one rate for all."""
    decay_all: bool = True
    """Whether weight decay applies to every parameter. false: not to norms, biases, tokens and position embeddings."""
    freeze_layers: int = 0
    """Number of the encoder's first layers (blocks of a ViT, residual blocks of a ResNet) whose parameters, and the
    stem's, do not change for optim.freeze_steps steps."""
    freeze_steps: int = 0
    """Optimizer steps for which optim.freeze_layers stay as they are."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, for pre-training: 0.999 averages about the last 1,000
    steps. The encoder that is registered in the end then has the averaged weights. none: no average."""

    def __post_init__(self) -> None:
        check_ranges(
            self, "optim", lr=Gt(0), weight_decay=Ge(0), momentum=Interval(ge=0, lt=1), warmup_steps=Ge(0),
            restart_epochs=Ge(1), clip_norm=Gt(0), layer_decay=Interval(gt=0, le=1), freeze_layers=Ge(0),
            freeze_steps=Ge(0), ema=Interval(gt=0, lt=1),
        )  # fmt: skip
        for one, other in (("freeze_layers", "freeze_steps"), ("freeze_steps", "freeze_layers")):
            alone = getattr(self, one) and not getattr(self, other)
            require(not alone, f"optim.{other}", 0, f"optim.{one} needs it; give --optim.{other} too")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Size, length and folder of the run."""

    output_dir: str = ""
    """The run's folder: journal, configuration, checkpoints."""
    batch_size: int = 256
    """Tiles in an optimizer step, over all processes and micro-batches."""
    micro_batch_size: int | None = None
    """Tiles that a process holds at a time; none processes its whole share of the batch at once."""
    accumulation: Literal["exact", "plain", "bitwise"] = "exact"
    """Gradient accumulation. exact: the gradient of the whole batch, to rounding. plain: the mean over micro-batches,
    with negatives only within each. bitwise: exact, and the same to the last bit on any number of processes and
    micro-batches; slower, in units of a block of model.norm_block * model.norm_group tiles. exact and bitwise refuse
    micro-batches under model.norm sync, because each would have its own statistics. Under bitwise every process uses
    one CPU thread, and a run resumes only on the same kind of machine."""
    epochs: int | None = None
    """Length of the run in epochs. Give this or run.steps."""
    steps: int | None = None
    """Length of the run in optimizer steps. Give this or run.epochs."""
    seed: int = 0
    """Seed of the initial weights, the sample order and the views."""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """Autocast precision of the encoder and heads; the losses are always computed in fp32."""
    tf32: bool = False
    """Whether a GPU rounds the inputs of fp32 convolutions and matrix products to TF32: faster with precision no."""
    fsdp: bool = False
    """Whether to share weights, gradients and optimizer state among the processes (FSDP2), for an encoder that does not
    fit one of them with its optimizer. A step is that of micro-batches: seven passes of a view instead of three. Not
    with run.accumulation bitwise or optim.name lars; of the figures only the curves are drawn."""
    checkpoint_every: int = 1000
    """Optimizer steps between checkpoints; one is always written at the end."""
    keep_last: int = 2
    """Number of newest checkpoints that are kept."""
    keep_every: int | None = None
    """Also keep the checkpoints of every so many optimizer steps permanently; none keeps only the newest."""
    log_every: int = 1
    """Optimizer steps between journal lines."""
    figures_every: int = 5
    """Epochs between figures of the curves and of the clusters; 0 draws them only at the end."""
    resume: str = "auto"
    """auto: resume from the newest checkpoint in run.output_dir if there is one; the settings must be those of its run.
    never: refuse a used folder. PATH: begin a new run from this checkpoint in a new run.output_dir; other settings are
    allowed, and the same command again resumes from the new run's own checkpoints."""
    max_skipped: int = 20
    """Consecutive steps that may be skipped because of a non-finite loss or gradient; after more the run stops."""

    def __post_init__(self) -> None:
        check_ranges(
            self, "run", batch_size=Ge(2), micro_batch_size=Ge(2), epochs=Ge(1), steps=Ge(1), checkpoint_every=Ge(1),
            keep_last=Ge(1), log_every=Ge(1), max_skipped=Ge(1), keep_every=Ge(1), figures_every=Ge(0),
            seed=Interval(ge=0, lt=2**31),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow tracking and registry."""

    uri: str | None = None
    """MLflow tracking URI; none uses MLFLOW_TRACKING_URI, or else an embedded SQLite store in tracking.root."""
    root: str = "ca2cl-runs"
    """Folder of the embedded store: database and artifacts."""
    experiment: str = "ca2cl"
    """MLflow experiment."""
    run_name: str | None = None
    """Name of the run; none uses the name of the output folder."""
    register_as: str | None = "ca2cl-encoder"
    """Registered model that gets the finished encoder (fine-tuning: the best classifier) as a new version; none
    registers nothing."""
    sinks: tuple[str, ...] = ()
    """Further metrics trackers beside MLflow, as module:Class of your own or by an installed package's name for it
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
