"""The shipped Slurm scripts on a real Slurm: two nodes of two processes, preempted, requeued, compared.

    python -m tests.deploy.slurm [--folder FOLDER]    # root; 15 minutes; packages: see tests/deploy/cluster.py

``launch/slurm/chain.sh`` is submitted on made-up tissue; its pre-training gets USR1 in the middle, goes back to the
queue by itself (where Slurm keeps it for two minutes) and finishes; probe and fine-tuning, which wait for it, run by
its MLflow id. Then the same pre-training is run without a disturbance and compared: weights, the journal, MLflow. A
last job is too long for its time limit, so that Slurm itself sends the signal. Ends with a table and 0, or with 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

from ca2cl.data.synthetic.tissue import write_tissue
from ca2cl.store.open import Store, open_store
from ca2cl.training.checkpoint import Checkpointer, read_state
from tests.deploy.check import Check, distance, steps, until
from tests.deploy.cluster import NODES, Cluster
from tests.support.jobs import ROOT

STEPS = 60
SETTINGS = ("--run.figures_every", "0", "--run.checkpoint_every", "20")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT", "OUT_OF_MEMORY")


def numbers(cluster: Cluster) -> dict[str, str]:
    """Job ids by name."""
    lines = cluster.run(["squeue", "--noheader", "--states=all", "--format", "%j %A"]).splitlines()
    return dict((line.split()[0], line.split()[1]) for line in lines)


def ended(cluster: Cluster, number: str) -> bool:
    return cluster.job(number)["JobState"] in ENDED


def chain(cluster: Cluster, folder: Path, environment: dict[str, str], check: Check) -> Path:
    """Submit the pipeline, preempt its pre-training once, wait for the end of all."""
    work = folder / "work"
    told = cluster.run(
        ["bash", "launch/slurm/chain.sh", "--run.steps", str(STEPS), *SETTINGS, "--tracking.root", environment["ROOT"]],
        **environment, TRAIN=str(folder / "train"), TEST=str(folder / "test"), WORK=str(work), NODES="2",
        RECIPE="smoke", PROBE=f"--tracking.root {environment['ROOT']} --seeds 2 --labels 1.0 --imagenet false",
        FINETUNE=f"--tracking.root {environment['ROOT']} --seeds 1 --labels 1.0 --epochs 1",
    )  # fmt: skip
    sys.stdout.write(f"{told}\n\n")
    jobs, run = numbers(cluster), work / "run"
    until("ten steps are done", lambda: len(steps(run)) >= 10 or ended(cluster, jobs["ca2cl-pretrain"]))
    cluster.run(["scancel", "--signal=USR1", jobs["ca2cl-pretrain"]])
    until("the job went back to the queue", lambda: cluster.job(jobs["ca2cl-pretrain"]).get("Restarts") == "1")
    stopped_at = len(steps(run))
    check.that("stopped before its end", 10 <= stopped_at < STEPS, f"after step {stopped_at} of {STEPS}")
    waits = {name: cluster.job(jobs[name])["JobState"] for name in ("ca2cl-probe", "ca2cl-finetune")}
    check.that("downstream jobs wait on", set(waits.values()) == {"PENDING"}, waits)
    for name, number in jobs.items():
        until(f"{name} ends", partial(ended, cluster, number))
        job = cluster.job(number)
        check.that(
            f"{name} on {job['NumNodes']} nodes, starts {int(job['Restarts']) + 1}",
            job["JobState"] == "COMPLETED",
            f"{job['JobState']} {job['ExitCode']}",
        )
    return run


def submit(
    cluster: Cluster, folder: Path, environment: dict[str, str], name: str, *flags: str, last: int = STEPS
) -> tuple[str, Path]:
    """The same pre-training as another job, of ``last`` steps; its number and its run's folder."""
    run = folder / name
    settings = (
        "--data.shards", str(folder / "work" / "shards" / "train"), "--run.output_dir", str(run),
        "--run.steps", str(last), *SETTINGS, "--tracking.root", environment["ROOT"],
    )  # fmt: skip
    options = ("--nodes", "2", "--job-name", name, "--output", str(folder / f"{name}.log"), *flags)
    number = cluster.run(
        ["sbatch", "--parsable", *options, "launch/slurm/job.sbatch", "pretrain", "--recipe", "smoke", *settings],
        **environment, CA2CL_LOGS=str(folder / "logs"),
    )  # fmt: skip
    return number, run


def undisturbed(cluster: Cluster, folder: Path, environment: dict[str, str], check: Check) -> Path:
    number, run = submit(cluster, folder, environment, "alone")
    until("the undisturbed job ends", partial(ended, cluster, number))
    check.that("undisturbed run", cluster.job(number)["JobState"] == "COMPLETED", cluster.job(number)["ExitCode"])
    return run


def limited(cluster: Cluster, folder: Path, environment: dict[str, str], check: Check) -> None:
    """A job that five minutes are too short for: the script's ``--signal`` says USR1 three minutes before, and Slurm
    may be a minute early."""
    number, run = submit(cluster, folder, environment, "limited", "--time", "5", last=100_000)
    until("Slurm stops it", lambda: cluster.job(number).get("Restarts") == "1" or ended(cluster, number))
    state = cluster.job(number)["JobState"]
    cluster.run(["scancel", number])
    told = (folder / "limited.log").read_text()
    check.that("stopped by Slurm before its limit", "exit code 85" in told and state == "PENDING", state)
    newest, done = Checkpointer(run / "checkpoints", keep_last=2).latest(), steps(run)
    kept = newest is not None and done == list(range(1, read_state(newest)["step"] + 1))
    check.that("with a checkpoint of its last step", kept, f"{newest and newest.name}, {len(done)} lines")


def compare(run: Path, alone: Path, store: Store, work: Path, check: Check) -> None:
    """Weights, journal, MLflow."""
    far = distance(run, alone)
    check.that("weights equal the undisturbed run's to 1e-5", far <= 1e-5, f"largest difference {far:.1e}")
    check.that("one journal, every step once", steps(run) == list(range(1, STEPS + 1)), f"{len(steps(run))} lines")
    run_id = json.loads((run / "run.json").read_text())["run_id"]
    client = store.client
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()], max_results=1000)
    same = [one for one in runs if one.data.params.get("run.output_dir") == str(run)]
    check.that("one MLflow run", [one.info.run_id for one in same] == [run_id], [one.info.status for one in same])
    history = sorted(point.step for point in client.get_metric_history(run_id, "loss"))
    check.that("every step's loss in MLflow, once", history == list(range(1, STEPS + 1)), f"{len(history)} points")
    sources = [one.data.tags.get("ca2cl.source_run_id") for one in runs]
    check.that("downstream runs name it", sources.count(run_id) >= 2, f"{sources.count(run_id)} runs")
    logs = sorted(path.relative_to(work) for path in (work / "logs").rglob("std*.log") if path.stat().st_size)
    ranks = {(path.parts[2], path.parts[-2]) for path in logs if path.parts[1].startswith("ca2cl-pretrain")}
    check.that("a log for every rank", len(ranks) == 4, sorted(ranks))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a new one; default: a temporary folder")
    folder = parser.parse_args().folder or Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.mkdir(parents=True, exist_ok=True)
    write_tissue(folder / "train", 30, size=48, seed=0)
    write_tissue(folder / "test", 10, size=48, seed=1)
    check, root = Check(), folder / "store"
    environment = {
        "CA2CL_VENV": sys.prefix, "CA2CL_PROCESSES": "2", "CA2CL_ACCELERATE": "accelerate_configs/cpu.yaml",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ROOT": str(root),
    }  # fmt: skip
    with Cluster(folder / "slurm") as cluster:
        run = chain(cluster, folder, environment, check)
        alone = undisturbed(cluster, folder, environment, check)
        limited(cluster, folder, environment, check)
        sys.stdout.write(cluster.run(["sinfo", "--Node", "--long"]) + "\n\n")
    check.that("nodes", len(NODES) == 2, ", ".join(NODES))
    compare(run, alone, open_store(root=root), folder / "work", check)
    code = check.table()
    sys.stdout.write(f"{folder}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
