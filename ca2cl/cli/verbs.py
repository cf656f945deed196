"""Table of the verbs: summary, module, settings, exit behaviour."""

from __future__ import annotations

from typing import NamedTuple


class Verb(NamedTuple):
    """A verb: its module with ``run(settings)``, and the name of the settings' dataclass."""

    summary: str
    module: str
    settings: str
    stops: bool = False
    """True if SIGTERM ends it with a checkpoint and exit code 85; Ctrl-C while it trains likewise, with 130."""
    raw: bool = False
    """True if ``run`` takes the words of the command line as they are."""
    shared: bool = False
    """True if the processes of a launch share its work: any other verb is rank 0's alone."""
    kept: str = "run it again"
    """Message after Ctrl-C: the work that is kept, and how to go on."""

    @property
    def settings_module(self) -> str:
        """The module of the settings' dataclass: ``config`` beside ``run``, else the verb's own module."""
        package, _, name = self.module.rpartition(".")
        return f"{package}.config" if name == "run" else self.module


_CELLS_KEPT = "finished cells and checkpoints are kept, and the same command goes on"
# A verb of two words belongs to the group that its first word names; that word may be a verb by itself, too.
VERBS = {
    "shard": Verb(
        "slides, or tiles in folders or a Hugging Face data set -> WebDataset shards",
        "ca2cl.data.shards.run",
        "ShardConfig",
        kept="finished shards are kept, and the same command goes on",
    ),
    "pretrain": Verb(
        "shards -> an encoder in MLflow's registry",
        "ca2cl.pretrain.run",
        "PretrainConfig",
        stops=True,
        shared=True,
        kept="checkpoints are kept, and the same command goes on",
    ),
    "study": Verb(
        "recipes x seeds -> encoders, probes and a table that compares them",
        "ca2cl.study.run",
        "StudyConfig",
        kept="finished jobs and checkpoints are kept, and the same command goes on",
    ),
    "launch": Verb(
        "accelerate launch for schedulers: passes on signals and exit codes", "ca2cl.cli.launch", "", raw=True
    ),
    "probe": Verb("evaluate frozen features on labelled shards", "ca2cl.evaluation.probe.run", "ProbeConfig"),
    "finetune": Verb(
        "fine-tune an encoder on labelled shards and evaluate it",
        "ca2cl.evaluation.finetune.run",
        "FinetuneConfig",
        stops=True,
        shared=True,
        kept=_CELLS_KEPT,
    ),
    "embed": Verb(
        "tiles or slides -> a file of feature vectors",
        "ca2cl.evaluation.embed.run",
        "EmbedConfig",
        shared=True,
        kept="finished parts are kept, and the same command goes on",
    ),
    "heatmap": Verb(
        "classes or clusters over slides -> pictures and GeoJSON for QuPath",
        "ca2cl.heatmap.run",
        "HeatmapConfig",
        shared=True,
        kept="finished parts are kept, and the same command goes on",
    ),
    "export": Verb(
        "an encoder -> a file for torchvision, timm, detectron2 or ONNX", "ca2cl.export.run", "ExportConfig"
    ),
    "detect": Verb(
        "train a gland detector from an encoder and evaluate it",
        "ca2cl.detection.train.run",
        "DetectConfig",
        stops=True,
        shared=True,
        kept=_CELLS_KEPT,
    ),
    "detect prepare": Verb("images with gland masks -> COCO files", "ca2cl.detection.prepare.run", "PrepareConfig"),
    "detect predict": Verb(
        "apply a detector to images -> COCO, masks, overlays", "ca2cl.detection.predict.run", "PredictConfig"
    ),
    "report": Verb("a run -> one HTML page", "ca2cl.report.run", "ReportConfig"),
    "encoders list": Verb("registered encoders with their best results", "ca2cl.encoders.list", "ListConfig"),
    "encoders show": Verb("one encoder: card, lineage, downstream runs", "ca2cl.encoders.show", "ShowConfig"),
    "encoders compare": Verb("downstream metrics of encoders side by side", "ca2cl.encoders.compare", "CompareConfig"),
    "encoders promote": Verb("move an alias to an encoder, if it is better", "ca2cl.encoders.promote", "PromoteConfig"),
    "encoders import": Verb("register an encoder from elsewhere", "ca2cl.encoders.import_.run", "ImportConfig"),
    "reproduce nct": Verb(
        "the authors' tables on NCT-CRC-HE, yours beside theirs",
        "ca2cl.reproduce.run",
        "NctConfig",
        shared=True,
        kept="finished steps and cells are kept, and the same command goes on",
    ),
    "sync": Verb(
        "send a run's missing metrics and artifacts to MLflow",
        "ca2cl.tracking.sync",
        "SyncConfig",
        kept="what MLflow has by now it keeps, and the same command sends the rest",
    ),
    "ui": Verb("MLflow's pages on the store of your runs", "ca2cl.cli.ui", "UiConfig"),
    "doctor": Verb(
        "check the machine, data, views and launch of a job", "ca2cl.doctor.run", "DoctorConfig", shared=True
    ),
    "doctor plan": Verb(
        "memory of each process of a planned job, by engine and micro-batch", "ca2cl.doctor.plan.run", "PlanConfig"
    ),
    "completion": Verb("completion of verbs and settings in bash or zsh", "ca2cl.cli.completion", "CompletionConfig"),
    "quickstart": Verb(
        "the whole pipeline on synthetic tissue, in minutes",
        "ca2cl.cli.quickstart",
        "QuickstartConfig",
        kept="the same command goes on where it was",
    ),
}
