"""Settings of ``ca2cl study``."""

from __future__ import annotations

from dataclasses import dataclass, field

from annotated_types import Ge

from ca2cl.common.ranges import check_ranges
from ca2cl.config import TrackingConfig
from ca2cl.errors import InputError

POSITIONAL = ("file",)


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Train every recipe of a study with several seeds, probe the encoders and compare the recipes in one table.

    The file names recipes of ``ca2cl pretrain``, what they differ in, the number of seeds, and the minutes or steps
    that each of them trains (docs/studies.md). For equal minutes each recipe is timed first. The numbers of steps are
    then fixed in output_dir/study.json. Without further flags all jobs run one after another. If the study is stopped
    or killed at any point, run the same command again to resume. Several of these commands at once share the jobs.
    """

    file: str
    """YAML file of the study, or the name of a shipped one, such as study_crc5."""
    output_dir: str = "study"
    """Folder of the study: study.json, RECIPE/seed-N for every run, the table. Run the same command again to resume."""
    shards: str | None = None
    """Shards to pre-train on; none uses the file's."""
    train: str | None = None
    """Shards of labelled tiles for the probe; none uses the file's, or else those that are pre-trained on."""
    test: tuple[str, ...] = ()
    """Shards of test tiles, one set or several; [] uses the file's."""
    job: int | None = None
    """Run only the job of this number, counted from 0, as in a Slurm array. Jobs count all recipes with seed 0 first,
    then all with seed 1, and so on."""
    list: bool = False
    """Only list the jobs with their numbers and states."""
    plan: bool = False
    """Only time the recipes and write study.json, before an array of jobs."""
    table: bool = False
    """Only write the table of the jobs that are finished."""
    launcher: str = ""
    """Words before ``-m ca2cl pretrain ...`` that start its processes, such as "ca2cl launch --multi_gpu
    --num_processes 8"; empty runs one process."""
    tracking: TrackingConfig = field(default_factory=lambda: TrackingConfig(register_as=None))
    """MLflow store of all runs. By default no encoder is registered."""

    def __post_init__(self) -> None:
        check_ranges(self, job=Ge(0))
        modes = [name for name in ("list", "plan", "table") if getattr(self, name)]
        modes += ["job"] if self.job is not None else []
        if len(modes) > 1:
            raise InputError(f"{' and '.join(modes)} exclude each other: give one of them")
        if not self.output_dir:
            raise InputError("output_dir is empty: give a folder for the study")
