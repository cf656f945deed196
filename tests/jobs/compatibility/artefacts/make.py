"""Makes the artefacts of ``test_artefacts.py`` and ``test_command_line.py`` with the code of commit f1aef52.

    git worktree add OLD f1aef52
    mkdir EMPTY && cd EMPTY && PYTHONPATH=OLD python TREE/tests/jobs/compatibility/artefacts/make.py

Works in the current folder and writes the three files that are committed beside this one. The artefacts name the folder
that they were made in; the test unpacks them elsewhere. ``PYTHONPATH`` must name the old tree alone, and this file
imports nothing of its own tree. Every job is a command of f1aef52 in a process of its own.

The weights are the reason for one trick. Trained weights do not compress, and the smallest encoder has 45 MB of them.
So before f1aef52's own writers get a tensor, it is made to repeat its first ``PERIOD`` values. Names, shapes, types and
digests in the files are as always, later jobs read what was written, and xz packs 500 MB into less than one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

HERE = Path(__file__).parent
PERIOD = 31  # prime, so that no two filters of a layer are the same by arithmetic
UNSERVED = {"checks", "detection", "evaluation", "export", "objective", "report", "reproduce", "training"}
CLASSES = ("ADI", "LYM", "TUM")
SMOKE = (
    "pretrain", "--recipe", "smoke", "--data.shards", "shards/train", "--data.lanes", "4",
    "--objective.clusters", "4", "--run.batch_size", "16", "--run.keep_last", "1",
)  # fmt: skip
FINISHED = (*SMOKE, "--run.output_dir", "run", "--tracking.run_name", "finished", "--run.steps")
STOPPED = (
    *SMOKE, "--run.output_dir", "stopped", "--tracking.run_name", "stopped", "--run.steps", "4",
    "--model.norm", "lane_group", "--model.norm_group", "4",
)  # fmt: skip


def run_verb(arguments: list[str], ends: str = "") -> int:
    """A command of f1aef52 in this process; ``ends`` is the signal and the step at which the process gets it."""
    for name in ("save", "save_file"):  # before ca2cl imports them
        setattr(safetensors.torch, name, _repeating(getattr(safetensors.torch, name)))
    from ca2cl.tracking.observer import RunObserver

    from ca2cl import cli

    def log_step(self: Any, record: dict[str, Any], log: Any = RunObserver.log_step) -> None:
        log(self, record)
        if ends and record["step"] == int(ends.partition("@")[2]):
            os.kill(os.getpid(), signal.Signals[ends.partition("@")[0]])

    RunObserver.log_step = log_step  # type: ignore[method-assign]
    sys.argv = ["ca2cl", *arguments]
    return cli.main()


def _repeating(write: Any) -> Any:
    def repeated(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.numel() <= PERIOD:
            return tensor
        flat = tensor.flatten()
        return flat[:PERIOD].repeat(-(-flat.numel() // PERIOD))[: flat.numel()].reshape(tensor.shape)

    def writer(tensors: Mapping[str, Tensor], *rest: Any, **more: Any) -> Any:
        return write({name: repeated(tensor) for name, tensor in tensors.items()}, *rest, **more)

    return writer


def start(*arguments: str, code: int = 0, ends: str = "") -> None:
    """The same in a process of its own, with the exit code that it must have."""
    done = subprocess.run([sys.executable, __file__, "--verb", ends, *arguments], check=False)
    assert done.returncode == code, (arguments, done.returncode)


def draw_tiles() -> None:
    """Tiles of three of the nine classes, four slides to train on and three to test on."""
    from ca2cl.data.synthetic import write_tissue

    for seed, (name, count, slides) in enumerate((("train", 12, "S0 S1 S2 S3"), ("test", 6, "T0 T1 T2"))):
        write_tissue(Path("drawn"), count, size=32, seed=seed)
        for label in CLASSES:
            folder = Path("tissue", name, label)
            folder.mkdir(parents=True)
            for number, tile in enumerate(sorted(Path("drawn", label).iterdir())):
                tile.rename(folder / f"{slides.split()[number % len(slides.split())]}-{tile.name}")
        shutil.rmtree("drawn")
        slides_of = ("--group_pattern", "([ST][0-9])-")
        start("shard", f"tissue/{name}", f"shards/{name}", *slides_of, "--samples_per_shard", "20")


def make_runs() -> None:
    """A finished run and its registered encoder, a run that SIGTERM stopped, one killed while MLflow was away."""
    start(*FINISHED, "3")
    start(*STOPPED, code=85, ends="SIGTERM@2")
    away = ("--tracking.uri", "http://127.0.0.1:9", "--tracking.run_name", "away")
    start(*SMOKE, *away, "--run.steps", "9", "--run.output_dir", "away", code=-9, ends="SIGKILL@3")


def go_on() -> dict[str, list[dict[str, Any]]]:
    """The next steps of both runs as f1aef52 itself does them; then everything is as it was before them."""
    shutil.copytree(".", "../before")
    start(*FINISHED, "4")
    start(*STOPPED)
    lines = {run: _new_steps(Path(run)) for run in ("run", "stopped")}
    os.chdir("..")
    shutil.rmtree("made")
    Path("before").rename("made")
    os.chdir("made")
    return lines


def _new_steps(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    begun = max(number for number, line in enumerate(lines) if line.get("status") == "RUNNING")
    return [line for line in lines[begun:] if "step" in line]


def use_them() -> None:
    """Probe, fine-tuning, vectors, and a second version of the registered model."""
    run_id = json.loads(Path("run", "run.json").read_text())["run_id"]
    data = ("--train", "shards/train", "--test", "shards/test", "--workers", "0")
    few = ("--labels", "0.5", "1.0", "--seeds", "2", "--imagenet", "false")
    start("encoders", "import", "random:1", "--input_size", "32")
    start("probe", "--encoder", run_id, *data, *few, "--output", "probe.json")
    start("probe", "--encoder", "models:/ca2cl-encoder/2", *data, *few, "--output", "probe-2.json")
    start(
        "finetune", "--encoder", run_id, *data, "--output_dir", "tuned", "--against", "[]", "--labels", "1.0",
        "--seeds", "1", "--epochs", "2", "--min_steps", "4", "--batch_size", "16",
    )  # fmt: skip
    start("embed", "--encoder", run_id, "shards/test", "vectors.parquet", "--workers", "0")


def detect() -> None:
    """Images of glands, prepared; a detector trained on them for a step; what it finds."""
    from ca2cl.data.synthetic_glands import write_glands

    write_glands(Path("images"), 2, 1, 60, 80, suffix=".png")
    start("detect", "prepare", "glas", "images", "glas")
    start(
        "detect", "--engine", "torchvision", "--encoder", "random:3", "--against", "[]", "--dataset", "glas",
        "--data", "glas", "--output_dir", "glands", "--iterations", "1", "--batch_size", "1", "--train_sides", "48",
        "--test_side", "64", "--workers", "0", "--precise_norm", "false",
    )  # fmt: skip
    detector = "glands/cells/encoder-seed0/detector"
    start("detect", "predict", detector, "glas/testA", "found", "--truth", "glas/testA.json", "--min_score", "0.05")


def pack(target: Path, names: list[str]) -> None:
    """The files as one archive. Pictures that no verb reads stay behind, and so does what serving never imports of the
    code inside a model; of equal files, such as the copies of an encoder, the second is a link."""
    first: dict[bytes, Path] = {}
    files = [path for name in names for path in sorted([Path(name), *Path(name).rglob("*")]) if path.is_file()]
    files = [path for path in files if path.suffix != ".png" or path.parts[0] == "glas"]
    files = [path for path in files if "code" not in path.parts or not UNSERVED & {*path.parts}]
    for path in files:
        same = first.setdefault(path.read_bytes(), path)
        if same is not path and path.stat().st_size:
            path.unlink()
            path.hardlink_to(same)
    with tarfile.open(target, "w:xz", preset=9) as archive:
        for path in files:
            archive.add(path, filter=_nobodys)


def _nobodys(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def main() -> None:
    """Everything, from an empty folder."""
    assert not list(Path().iterdir()), "start in an empty folder"
    Path("made").mkdir()
    os.chdir("made")
    done = subprocess.run([sys.executable, HERE / "facts.py"], capture_output=True, text=True, check=True)
    facts = json.loads(done.stdout)
    draw_tiles()
    make_runs()
    facts["continued"] = go_on()
    use_them()
    names = ["shards", "run", "stopped", "away", "tuned", "ca2cl-runs", "vectors.parquet", "probe.json", "probe-2.json"]
    pack(HERE / "f1aef52-runs.tar.xz", names)
    detect()
    pack(HERE / "f1aef52-detector.tar.xz", ["glas", "glands", "found"])
    (HERE / "f1aef52.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--verb"]:
        sys.exit(run_verb(sys.argv[3:], sys.argv[2]))
    main()
