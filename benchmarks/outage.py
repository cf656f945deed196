"""Does an outage of MLflow slow a training down, and does it cost a number?

    python -m benchmarks.outage [--seconds 180] [--outage 60] [--image_size 64] [--batch 64]

Two real jobs (``ca2cl pretrain``, one process and one thread each) of the same settings run side by side for so many
seconds after their first steps, each with a real MLflow server of its own on this machine; so whatever else the machine
does, it does to both. In the middle the server of one of them is stopped, and started again after the outage. A step's
time is what lies between two lines of the journal. Afterwards every number of both journals is looked for in MLflow:
what is missing when the job has ended, and what after ``ca2cl sync``, and what is there more than once.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.jobs import write_shards
from ca2cl.store.open import open_store
from ca2cl.tracking.journal import training_lines
from ca2cl.tracking.replay import metrics_of
from ca2cl.tracking.run_record import read_run
from ca2cl.tracking.sync import sync
from tests.support.servers import Server

BAR = 0.05
WARM_UP = 3
"""Steps that are not counted."""
PATIENCE = 600
"""Seconds that a server may take to start."""


@dataclass
class Training:
    """A job with its server."""

    folder: Path
    server: Server
    process: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(cls, folder: Path, shards: Path, options: argparse.Namespace) -> Training:
        folder.mkdir()
        made = cls(folder, Server(folder))
        made.server.start(PATIENCE)
        command = [
            sys.executable, "-m", "ca2cl", "pretrain", "--recipe", "smoke", "--data.shards", str(shards),
            "--data.image_size", str(options.image_size), "--run.batch_size", str(options.batch),
            "--run.steps", "1000000", "--run.checkpoint_every", "1000000", "--run.figures_every", "0",
            "--run.output_dir", str(made.run_dir), "--tracking.uri", made.server.uri, "--tracking.register_as", "null",
        ]  # fmt: skip
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        with (folder / "job.log").open("wb") as log:
            made.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        return made

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def lines(self) -> list[dict[str, Any]]:
        path = self.run_dir / "journal.jsonl"
        return list(training_lines(path)) if path.exists() else []

    def seconds(self, first: float, last: float) -> list[float]:
        """Times of the steps that began and ended between two Unix times."""
        times = [line["time"] for line in self.lines()]
        return [b - a for a, b in zip(times, times[1:], strict=False) if first <= a and b <= last]

    def stop(self) -> None:
        """End the job as a scheduler would."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        if self.process.wait() != 85:
            raise SystemExit(f"the job failed:\n{self.told()}")

    def told(self) -> str:
        return (self.folder / "job.log").read_text()[-3000:]

    def kept(self) -> tuple[int, int, int]:
        """Numbers in the journal; how many of them MLflow does not have; how many it has more than once."""
        client, run_id = open_store(self.server.uri).client, read_run(self.run_dir).run_id
        wanted = Counter((one.key, one.step, one.value) for line in self.lines() for one in metrics_of(line))
        names = {name for name, _, _ in wanted}
        found = Counter(
            (one.key, one.step, one.value) for name in names for one in client.get_metric_history(run_id, name)
        )
        return wanted.total(), (wanted - found).total(), (found - wanted).total()


def measure(options: argparse.Namespace, folder: Path) -> None:
    shards = write_shards(folder)
    disturbed, calm = (Training.start(folder / name, shards, options) for name in ("disturbed", "calm"))
    try:
        while min(len(disturbed.lines()), len(calm.lines())) < WARM_UP:
            for one in (disturbed, calm):
                if one.process is None or one.process.poll() is not None:
                    raise SystemExit(f"the job failed:\n{one.told()}")
            time.sleep(0.5)
        begun = time.time()
        time.sleep((options.seconds - options.outage) / 2)
        disturbed.server.stop()
        away = time.time()
        time.sleep(options.outage)
        back = time.time()
        disturbed.server.start(PATIENCE)
        time.sleep(max(0.0, begun + options.seconds - time.time()))
        ended = time.time()
        for one in (disturbed, calm):
            one.stop()
        report(disturbed, calm, {"whole run": (begun, ended), "outage": (away, back)})
    finally:
        for one in (disturbed, calm):
            if one.process is not None:
                one.process.kill()
            one.server.stop()


def report(disturbed: Training, calm: Training, windows: dict[str, tuple[float, float]]) -> None:
    """Print step times and their ratios, and what MLflow has."""
    print("| | steps | mean, ms | median, ms | of the calm one | mean, ms | median, ms | ratio of means | of medians |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    ratios = {}
    for name, window in windows.items():
        ours, theirs = disturbed.seconds(*window), calm.seconds(*window)
        if not ours or not theirs:
            print(f"| {name} | no whole step of both: give more --seconds, or a smaller --batch |")
            continue
        means, medians = ([kind(x) for x in (ours, theirs)] for kind in (statistics.mean, statistics.median))
        ratios[name] = means[0] / means[1]
        print(
            f"| {name} | {len(ours)} | {means[0] * 1000:.0f} | {medians[0] * 1000:.0f} | {len(theirs)} "
            f"| {means[1] * 1000:.0f} | {medians[1] * 1000:.0f} | {ratios[name]:.3f} | {medians[0] / medians[1]:.3f} |"
        )
    for name, one in (("disturbed", disturbed), ("calm", calm)):
        total, missing, _ = one.kept()
        sync(one.run_dir, one.server.uri)
        _, still, extra = one.kept()
        print(f"{name}: {total} numbers, {missing} missing at the job's end, {still} after `ca2cl sync`, {extra} twice")
    if "whole run" in ratios:
        print(f"mean step time, disturbed / calm: {ratios['whole run']:.3f} (wanted within {BAR:.0%} of 1)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180, help="after the first steps")
    parser.add_argument("--outage", type=float, default=60, help="seconds of them that the server is away")
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure(options, Path(temporary))


if __name__ == "__main__":
    main()
