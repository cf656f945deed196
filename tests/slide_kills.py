"""``ca2cl shard`` of slides, killed at random instants of its life, on one and two processes.

    python -m tests.slide_kills [--kills 50] [--seed 0] [--folder FOLDER]

Slides are made: six that give tiles, one without a resolution, one broken file, one copy. A job in a new folder is
killed (SIGKILL to its first process, to all of them, or to a worker) one to three times, each time started again, and
then let finish. Its shards must have the digest of a job that was left alone, its ``slides.jsonl`` the same rows but
for the seconds, its folder the same files, and no process and no semaphore may be left. Exit code 0 when all holds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from ca2cl.data.shards.index import ShardIndex
from tests.support.jobs import ROOT
from tests.support.slides import tissue_picture, write_svs

PATIENCE = 60.0
"""Seconds that the processes of a killed job may take to end; one whose worker was killed may be at its end."""
FLAGS = (
    "--mpp", "0.5", "--tile", "64", "--samples_per_shard", "200", "--sharpness", "0",
)  # fmt: skip


def make_slides(folder: Path) -> Path:
    """The slides of every job."""
    folder.mkdir()
    for number in range(6):
        write_svs(folder / f"s{number}.svs", tissue_picture(2000, 1500, number), 0.5, levels=(2,))
    write_svs(folder / "unknown.svs", tissue_picture(300, 300), None)
    (folder / "broken.svs").write_bytes(b"none")
    (folder / "twin.svs").symlink_to(folder / "s0.svs")
    return folder


def start(slides: Path, out: Path, workers: int) -> subprocess.Popen[bytes]:
    """The job, in a session of its own."""
    command = [sys.executable, "-m", "ca2cl", "shard", str(slides), str(out), *FLAGS, "--workers", str(workers)]
    command += ["--preview", str(out.with_suffix(".html"))]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = out.with_suffix(".log").open("ab")
    return subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)


def members(session: int) -> list[int]:
    """Processes of a session that still run."""
    found = []
    for process in psutil.process_iter(["status"]):
        with suppress(ProcessLookupError):
            if os.getsid(process.pid) == session and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def is_tracker(process: int) -> bool:
    """True for the process of Python that removes semaphores: nobody could once that is killed, too."""
    with suppress(psutil.Error):
        return any("resource_tracker" in word for word in psutil.Process(process).cmdline())
    return False


def stage(out: Path) -> str:
    """How far a job is."""
    if (out / "manifest.json").exists():
        return "done"
    if any(out.glob("*.tar")) or any(out.glob(".*.tar.tmp-*")):
        return "pack"
    if any(out.glob(".plan/slides/*/*.bin")):
        return "cut"
    return "scan" if (out / ".plan" / "slides").exists() else "start"


def kill(draw: random.Random, job: subprocess.Popen[bytes], out: Path, seen: Counter[str]) -> None:
    """One SIGKILL, and the end of all that the job had started.

    Raises:
        AssertionError: a process is left.
    """
    target = draw.choice(("first", "all", "worker"))
    workers = [one for one in members(job.pid) if one != job.pid and not is_tracker(one)]
    victims = {"first": [job.pid], "all": [job.pid, *workers], "worker": [draw.choice(workers or [job.pid])]}[target]
    seen[stage(out)] += 1
    for victim in victims:
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while job.poll() is None or members(job.pid):
        if time.monotonic() > deadline:
            raise AssertionError(f"{members(job.pid)} are left of a killed job; see {out.with_suffix('.log')}")
        time.sleep(0.01)


def facts(out: Path) -> dict[str, Any]:
    """What must be the same after any disturbance."""
    rows = [json.loads(line) for line in (out / "slides.jsonl").read_text().splitlines()]
    return {
        "digest": ShardIndex(out).manifest.digest,
        "rows": [{name: value for name, value in row.items() if name != "seconds"} for row in rows],
        "files": sorted(str(path.relative_to(out)) for path in out.rglob("*")),
        "preview": out.with_suffix(".html").stat().st_size,
    }


def unused_semaphores() -> set[str]:
    """Semaphores of multiprocessing that no process of this machine has mapped."""
    folder = Path("/dev/shm")
    names = {path.name for path in folder.glob("sem.mp-*")} if folder.is_dir() else set()
    mapped = ""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            mapped += (process / "maps").read_text()
    return {name for name in names if name not in mapped}


def finish(slides: Path, out: Path, workers: int) -> dict[str, Any]:
    """Let a job end.

    Raises:
        AssertionError: it does not.
    """
    job = start(slides, out, workers)
    if job.wait() != 0:
        raise AssertionError(f"exit code {job.returncode}; see {out.with_suffix('.log')}")
    return facts(out)


def main() -> int:
    """Kill, finish, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="instants at which a job is killed")
    parser.add_argument("--seed", type=int, default=0, help="of instants and victims")
    parser.add_argument("--folder", type=Path, help="for all files; none takes a temporary one")
    settings = parser.parse_args()
    draw, seen, faults = random.Random(settings.seed), Counter[str](), []
    with tempfile.TemporaryDirectory() as scratch:
        folder = settings.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        slides, before = make_slides(folder / "slides"), unused_semaphores()
        expected, seconds = {}, {}
        for workers in (1, 2):
            began = time.monotonic()
            expected[workers] = finish(slides, folder / f"alone{workers}", workers)
            seconds[workers] = time.monotonic() - began
        if expected[1] != expected[2]:
            faults.append("one process and two do not agree")
        killed = 0
        while killed < settings.kills:
            workers, out = draw.choice((1, 2)), folder / f"job{killed:03d}"
            for _ in range(min(draw.choice((1, 1, 2, 3)), settings.kills - killed)):
                job = start(slides, out, workers)
                with suppress(subprocess.TimeoutExpired):
                    job.wait(draw.uniform(0, seconds[workers]))
                kill(draw, job, out, seen)
                killed += 1
            found = finish(slides, out, workers)
            faults += [f"{out}: other {name}" for name in found if found[name] != expected[1][name]]
            sys.stdout.write(f"{killed} kills, {len(faults)} faults, {dict(seen)}\n")
            sys.stdout.flush()
        if left := unused_semaphores() - before:
            faults.append(f"semaphores left: {sorted(left)}")
    sys.stdout.write(
        "\n".join([*faults, f"{killed} kills ({dict(seen)}): {len(faults)} faults, {expected[1]['digest']}\n"])
    )
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
