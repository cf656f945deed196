"""``launch/slurm/study.sbatch`` on a real Slurm: a plan, an array of two jobs on two nodes each, one preempted.

    python -m tests.deploy.slurm_study [--folder FOLDER]    # root; 10 minutes; packages: see tests/deploy/cluster.py

The array's tasks wait for the plan. The first one gets USR1 in the middle of its training, goes back to the queue by
itself (where Slurm keeps it for two minutes) and finishes. The task that ends last writes the table. Ends with a table
and 0, or with 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

from ca2cl.study.jobs import Job, all_jobs
from tests.deploy.check import Check, steps, until
from tests.deploy.cluster import Cluster
from tests.deploy.slurm import ended
from tests.support.jobs import make_shards

STEPS = 40
STUDY = f"""
seeds: 1
steps: {STEPS}
settings: {{run: {{checkpoint_every: 20, figures_every: 0}}}}
recipes:
  full: {{recipe: smoke}}
  plain: {{recipe: smoke, method: {{name: simclr}}}}
probe: {{labels: [1.0], seeds: 1, classifiers: [knn], workers: 0}}
"""


def submit(cluster: Cluster, folder: Path, *flags: str, plan: bool = False) -> str:
    """A job of the study; its number."""
    settings = (
        str(folder / "small.yaml"), "--shards", str(folder / "shards-0"), "--test", str(folder / "shards-1"),
        "--output_dir", str(folder / "out"), "--tracking.root", str(folder / "store"), *(["--plan"] if plan else []),
    )  # fmt: skip
    environment = {
        "CA2CL_VENV": sys.prefix, "CA2CL_PROCESSES": "1", "CA2CL_ACCELERATE": "accelerate_configs/cpu.yaml",
        "OMP_NUM_THREADS": "1", "CA2CL_LOGS": str(folder / "logs"),
    }  # fmt: skip
    options = ("--parsable", "--output", f"{folder}/%x-%A-%a.log", *flags)
    return cluster.run(["sbatch", *options, "launch/slurm/study.sbatch", *settings], **environment)


def run_array(cluster: Cluster, folder: Path, check: Check) -> list[Job]:
    plan = submit(cluster, folder, plan=True)
    array = submit(cluster, folder, "--array", "0-1%1", "--dependency", f"afterok:{plan}", "--nodes", "2")
    until("the plan is made", partial(ended, cluster, plan))
    check.that("plan", cluster.job(plan)["JobState"] == "COMPLETED", cluster.job(plan)["ExitCode"])
    first, second = all_jobs(folder / "out", json.loads((folder / "out" / "study.json").read_text())["steps"], 1)
    tasks = [f"{array}_{number}" for number in range(2)]
    until("ten steps are done", lambda: len(steps(first.folder)) >= 10 or ended(cluster, tasks[0]))
    cluster.run(["scancel", "--batch", "--signal=USR1", tasks[0]])
    until("the task went back to the queue", lambda: cluster.job(tasks[0]).get("Restarts") == "1")
    stopped_at = len(steps(first.folder))
    check.that("stopped before its end", 10 <= stopped_at < STEPS, f"after step {stopped_at} of {STEPS}")
    for name in tasks:
        until(f"{name} ends", partial(ended, cluster, name))
        job = cluster.job(name)
        found = f"{job['JobState']} {job['ExitCode']}, starts {int(job['Restarts']) + 1}, nodes {job['NumNodes']}"
        check.that(f"task {name}", job["JobState"] == "COMPLETED" and job["NumNodes"] == "2", found)
    return [first, second]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a new one; default: a temporary folder")
    folder = parser.parse_args().folder or Path(tempfile.mkdtemp(prefix="slurm-study-"))
    folder.mkdir(parents=True, exist_ok=True)
    make_shards(folder, 8, seed=0)
    make_shards(folder, 4, seed=1)
    (folder / "small.yaml").write_text(STUDY)
    check = Check()
    with Cluster(folder / "slurm") as cluster:
        jobs = run_array(cluster, folder, check)
    for job in jobs:
        done = steps(job.folder)
        check.that(f"{job.name}: every step once", done == list(range(1, STEPS + 1)), f"{len(done)} lines")
        processes = json.loads((job.folder / "environment.json").read_text())["processes"]
        check.that(f"{job.name}: two processes", processes == 2, processes)
    table = folder / "out" / "study-results.json"
    runs = json.loads(table.read_text())["runs"] if table.exists() else None
    check.that("the last task wrote the table", runs == {"finished": 2, "of": 2}, runs)
    code = check.table()
    sys.stdout.write(f"{folder}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
