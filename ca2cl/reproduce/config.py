"""Settings of ``ca2cl reproduce nct`` and of its steps."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from annotated_types import Ge

from ca2cl.config import OptimConfig, TrackingConfig, check_ranges
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
    """The method's authors' two tables on NCT-CRC-HE, linear probe and fine-tuning at 1, 10, 50 and 100 % of the
    labels: every cell of them by your encoder, beside theirs.

    The tiles are those of zenodo.org/records/1214456 as they are published, DATA/NCT-CRC-HE-100K/<CLASS>/*.tif and
    DATA/CRC-VAL-HE-7K/<CLASS>/*.tif (or shards in folders of these names); --download fetches them, 12.5 GB. They are
    sharded, every tile goes through the encoder once for the linear cells, and the encoder is fine-tuned for each of
    the others. Stopped or killed at any point, the same command goes on: in a download, a cell, or between them. Under
    ``accelerate launch`` the processes share the work. --plan shows what is done and what is not.
    """

    encoder: str
    """Run id or its first digits, version number, alias (champion, latest), models:/NAME/VERSION, run folder,
    .safetensors file, torchvision:IMAGENET1K_V1 or random."""
    data: str
    """Folder with the published folders NCT-CRC-HE-100K and CRC-VAL-HE-7K, or for --download to put them."""
    output_dir: str = "reproduce-nct"
    """Folder of the job: shards, vectors, cells, the table. A job started again goes on."""
    train_set: TrainSet = "NCT-CRC-HE-100K"
    """Where labels are drawn: the tiles with normalised colours, or those without."""
    download: bool = False
    """Fetch and unpack what is missing in data."""
    record_url: str = RECORD_URL
    """JSON of the record that lists the archives with their sizes and MD5s; another one for a mirror."""
    tasks: tuple[str, ...] = TASKS
    """Tables to fill: linear, finetune or both. Others may be added to a folder later."""
    protocol: ProtocolName = "honest"
    """honest: labels without replacement, held-out labelled tiles choose; original: what the authors did, task by task
    (`ca2cl finetune`'s protocol original, its linear cells with trains head), to be compared with their tables and with
    nothing else. Settings of fine-tuning that are left out are then theirs, for the linear cells too."""
    labels: tuple[float, ...] = BUDGETS
    """Label budgets: a fraction of each class's tiles up to 1, or a whole number of tiles a class above 1."""
    seeds: int | None = None
    """Draws of the labelled tiles for every budget; none takes 5, or 2 in miniature."""
    image_size: int | None = None
    """Side in pixels that the encoder sees; none takes the encoder's own, or 48 in miniature."""
    epochs: int | None = None
    """Most passes over the labelled tiles in fine-tuning; none takes 20, or theirs, or 3 in miniature."""
    min_steps: int | None = None
    """Steps that a fine-tuning has at least, in more passes where few tiles are labelled; none takes 200, or 12 in
    miniature, or 1 as theirs."""
    batch_size: int | None = None
    """Tiles in an optimizer step of fine-tuning, over all processes; none takes 64, or 128 as theirs."""
    micro_batch_size: int | None = None
    """Most tiles that one process holds at a time in fine-tuning; none takes its whole share of the batch at once."""
    norm: Literal["sync", "frozen"] = "sync"
    """BatchNorm in fine-tuning. sync: statistics of the batch, over all processes; frozen: the encoder's own."""
    augment: Augmentation = "auto"
    """How labelled tiles are augmented in fine-tuning. crop: random resized crops; ca2cl: the paper's weak view;
    strong: its strong view; none: not at all; auto: crop, or strong as theirs."""
    against: tuple[str, ...] = ()
    """Other encoders that are fine-tuned in the same way, for the gain over them: random, for one."""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """Autocast precision of vectors and of fine-tuning."""
    embed_batch_size: int = 256
    """Tiles that go through the encoder at once where it is frozen."""
    workers: int = 2
    """Decoding processes for each process, and sharding processes; 0 decodes in the process itself."""
    plan: bool = False
    """Say what would be done and what is done already, and do nothing."""
    miniature: bool = False
    """Draw made-up tissue into data, in the published layout, and fill the tables with it in minutes: to see that all
    works here before 12.5 GB are fetched. Its numbers mean nothing."""
    optim: OptimConfig = field(default_factory=lambda: OPTIM)
    """Fine-tuning's optimizer; by default SGD and a cosine that starts again every 5 epochs. By protocol original what
    is left at its default is theirs."""
    tracking: TrackingConfig = field(default_factory=lambda: TrackingConfig(register_as=None))
    """Where the encoder is found and the result is logged. Nothing is registered."""

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
