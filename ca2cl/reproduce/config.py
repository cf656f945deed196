"""Settings of ``ca2cl reproduce nct`` and of its steps."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from annotated_types import Ge

from ca2cl.common.ranges import check_ranges
from ca2cl.config import OptimConfig, TrackingConfig
from ca2cl.errors import InputError, nearest
from ca2cl.evaluation.embed.config import EmbedConfig
from ca2cl.evaluation.finetune.config import OPTIM, Augmentation, FinetuneConfig, Trains
from ca2cl.evaluation.protocol import ProtocolName
from ca2cl.reproduce.published_results import BUDGETS

TrainSet = Literal["NCT-CRC-HE-100K", "NCT-CRC-HE-100K-NONORM"]
TEST_SET = "CRC-VAL-HE-7K"
TASKS = ("linear", "finetune")
KEPT = "free some space and start again: finished cells are kept"
RECORD_URL = "https://zenodo.org/api/records/1214456"
_FULL = {"seeds": 5, "epochs": 20, "min_steps": 200}
_SMALL = {"seeds": 2, "epochs": 3, "min_steps": 12, "image_size": 48}


@dataclass(frozen=True, kw_only=True)
class NctConfig:
    """Fill the method's authors' two tables on NCT-CRC-HE with your encoder's results, beside theirs.

    The tables are linear probe and fine-tuning at 1, 10, 50 and 100 % of the labels. The tiles are those of
    zenodo.org/records/1214456 as published, DATA/NCT-CRC-HE-100K/<CLASS>/*.tif and DATA/CRC-VAL-HE-7K/<CLASS>/*.tif (or
    shards in folders of these names); --download fetches them (12.5 GB). They are sharded, embedded once for the linear
    cells, and used to fine-tune the encoder for each of the other cells. If the job is stopped or killed at any point,
    run the same command again to resume. Under ``accelerate launch`` the processes share the work. --plan lists what is
    done and what is left.
    """

    encoder: str
    """Run id or its first digits, version number, alias (champion, latest), models:/NAME/VERSION, run folder,
    .safetensors file, timm:NAME.TAG, hf-hub:ORG/NAME, torchvision:IMAGENET1K_V1 or random."""
    data: str
    """Folder that has, or with --download gets, the published folders NCT-CRC-HE-100K and CRC-VAL-HE-7K."""
    output_dir: str = "reproduce-nct"
    """Folder of the job: shards, vectors, cells, the table. Run the same command again to resume."""
    train_set: TrainSet = "NCT-CRC-HE-100K"
    """Training set: tiles with normalised colours, or without (NONORM)."""
    download: bool = False
    """Download and unpack what is missing in data."""
    record_url: str = RECORD_URL
    """URL of the record's JSON, which lists the archives with sizes and MD5s; set it for a mirror."""
    tasks: tuple[str, ...] = TASKS
    """Tables to fill: linear, finetune or both. The other one may be added to the folder later."""
    protocol: ProtocolName = "honest"
    """honest: labels without replacement, and held-out labelled tiles choose the model. original: what the authors did
    in each task (see `ca2cl finetune`; linear cells with trains head), for comparison with their tables only. Settings
    left at their defaults then take the authors' values, for the linear cells too."""
    labels: tuple[float, ...] = BUDGETS
    """Label budgets: up to 1, a fraction of each class's tiles; above 1, a number of tiles for each class."""
    seeds: int | None = None
    """Number of random draws of labelled tiles for every budget; none uses 5, or 2 with miniature."""
    image_size: int | None = None
    """Side of the input in pixels; none uses that of the encoder, or 48 with miniature."""
    epochs: int | None = None
    """Maximum number of epochs of fine-tuning; none uses 20, or the authors' with protocol original, or 3 with
    miniature."""
    min_steps: int | None = None
    """Minimum number of steps of fine-tuning, with more epochs if few tiles are labelled; none uses 200, or 12 with
    miniature, or 1 with protocol original."""
    batch_size: int | None = None
    """Tiles in an optimizer step of fine-tuning, over all processes; none uses 64, or 128 with protocol original."""
    micro_batch_size: int | None = None
    """Maximum number of tiles that a process holds at a time in fine-tuning; none processes its whole share at once."""
    norm: Literal["sync", "frozen"] = "sync"
    """BatchNorm in fine-tuning. sync: statistics of the batch over all processes; frozen: the encoder's, unchanged."""
    augment: Augmentation = "auto"
    """Augmentation in fine-tuning. crop: random resized crops; ca2cl: the paper's weak view; strong: its strong view;
    none: no augmentation; auto: crop, or strong with protocol original."""
    against: tuple[str, ...] = ()
    """Other encoders to fine-tune in the same way, such as random, to show the gain over them."""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """Autocast precision of embedding and fine-tuning."""
    embed_batch_size: int = 256
    """Tiles in a forward pass of the frozen encoder."""
    workers: int = 2
    """Decoding processes for each process, and sharding processes; 0 decodes in the process itself."""
    plan: bool = False
    """Only list the steps, done and to do."""
    miniature: bool = False
    """Draw synthetic tissue into data, in the published layout, and fill the tables with it in minutes. This tests the
    installation before 12.5 GB are downloaded. The numbers mean nothing."""
    optim: OptimConfig = field(default_factory=lambda: OPTIM)
    """Optimizer of fine-tuning; by default SGD and a cosine that restarts every 5 epochs. With protocol original,
    defaults become the authors' values."""
    tracking: TrackingConfig = field(default_factory=lambda: TrackingConfig(register_as=None))
    """MLflow store of the encoder and of the result. Nothing is registered."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise InputError(f"tasks is empty: give one or both of {', '.join(TASKS)}")
        for task in self.tasks:
            if task not in TASKS:
                raise InputError(f"tasks has {task!r}: {nearest(task, TASKS)}")
        check_ranges(self, embed_batch_size=Ge(1))
        if self.miniature and self.download:
            raise InputError("download with miniature: its tiles are drawn here; leave one of them out")
        if not self.record_url.startswith(("http://", "https://")):
            raise InputError(f"record_url is {self.record_url!r}: give the http(s) address of a record's JSON")
        if Path(self.output_dir).resolve() == Path(self.data).resolve():
            raise InputError(f"output_dir is {self.output_dir!r}, the folder of data: use another folder")
        tuning(self)  # has an opinion of labels, seeds, epochs, ...

    @property
    def out(self) -> Path:
        """The job's folder."""
        return Path(self.output_dir)

    @property
    def sets(self) -> tuple[str, str]:
        """Names of the training set and of the test set."""
        return self.train_set, TEST_SET

    def shards(self, name: str) -> Path:
        """The shards of a set: in data where that holds shards, else the job's own."""
        from ca2cl.data.shards.index import MANIFEST_NAME

        published = Path(self.data) / name
        return published if (published / MANIFEST_NAME).exists() else self.out / "shards" / name

    def vectors(self, name: str) -> Path:
        """The file of a set's vectors."""
        return self.out / "vectors" / f"{name}.parquet"


def settled(config: NctConfig) -> NctConfig:
    """The settings with a number wherever none stood for one; but for the lengths of protocol original, which are
    fine-tuning's to know."""
    defaults: dict[str, Any] = _FULL | (_SMALL if config.miniature else {})
    if config.protocol == "original":
        del defaults["min_steps"]
        if not config.miniature:
            del defaults["epochs"]
    given = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return replace(config, **given) if given else config


JOBS: dict[Trains, str] = {"head": "linear-head", "all": "finetune"}
"""Folders of the jobs of ``ca2cl finetune``."""


def jobs(config: NctConfig) -> list[Trains]:
    """The part that each job of ``ca2cl finetune`` trains: head for protocol original's linear cells, or all."""
    wanted: dict[Trains, bool] = {
        "head": "linear" in config.tasks and config.protocol == "original", "all": "finetune" in config.tasks,
    }  # fmt: skip
    return [trains for trains, asked in wanted.items() if asked]


def tuning(config: NctConfig, trains: Trains = "all") -> FinetuneConfig:
    """The settings of such a job."""
    config = settled(config)
    # absolute: fine-tuning compares them as text, and the same job may be started from another working directory
    train, test = (str(config.shards(name).resolve()) for name in config.sets)
    shared = {f.name for f in fields(config)} & {f.name for f in fields(FinetuneConfig)} - {"output_dir", "tracking"}
    return FinetuneConfig(
        **{name: getattr(config, name) for name in shared},
        train=train,
        test=test,
        trains=trains,
        output_dir=str(config.out / JOBS[trains]),
        tracking=replace(
            config.tracking,
            register_as=None,
            run_name=f"reproduce nct: {'fine-tuning' if trains == 'all' else 'linear probe'}",
        ),
    )


def embedding(config: NctConfig, name: str) -> EmbedConfig:
    """The settings of the job that makes a set's vectors."""
    config = settled(config)
    return EmbedConfig(
        encoder=config.encoder,
        source=str(config.shards(name)),
        out=str(config.vectors(name)),
        batch_size=config.embed_batch_size,
        workers=config.workers,
        image_size=config.image_size,
        precision=config.precision,
        tracking=config.tracking,
    )
