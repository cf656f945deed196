"""Memory and time of ``ca2cl shard`` over many slides: both must not grow with their number.

    python -m benchmarks.cohort [--slides 10000] [--copies] [FLAGS OF ca2cl shard]

The slides are small ones of 100 tiles that differ in their description only. With ``--copies`` they are hard links of
one, which are recognised and cut once. Each line is a tenth of the slides: seconds since the start, and the largest
resident memory of all processes together meanwhile; the last line is what follows the last slide, such as the shards.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.checkouts import HERE, children_cpu, environment, python
from benchmarks.slides import picture, write_slide

SIDE, TILE = 480, 48
_MARK = b"AppMag = 20|"
_EVERY_S = 0.5


def write_slides(folder: Path, count: int, copies: bool) -> None:
    """So many slides of ``SIDE`` pixels."""
    first = write_slide(folder.with_suffix(".svs"), "jpeg", picture(), SIDE)
    data = first.read_bytes()
    place = data.index(_MARK)
    for number in range(count):
        path = folder / f"{number // 1000:03d}" / f"s{number:06d}.svs"
        path.parent.mkdir(parents=True, exist_ok=True)
        if copies:
            path.hardlink_to(first)
        else:
            name = f"I={number:09d}|".encode()
            path.write_bytes(data[:place] + name + data[place + len(name) :])


def _memory(job: psutil.Process) -> float:
    """Resident gigabytes of a process and all below it."""
    total = 0
    for one in (job, *job.children(recursive=True)):
        with suppress(psutil.Error):
            total += one.memory_info().rss
    return total / 1e9


def measure(folder: Path, count: int, out: Path, flags: Sequence[str]) -> None:
    """Run the job, and print a line for each tenth.

    Raises:
        SystemExit: with the job's own words where it fails.
    """
    words = ("-m", "ca2cl", "shard", str(folder), str(out), "--mpp", "0.5", "--tile", str(TILE), *flags)
    began, used = time.monotonic(), children_cpu()
    output = out.with_suffix(".log")
    with output.open("w") as file:
        job = psutil.Popen(python(*words), env=environment(HERE), stdout=file, stderr=subprocess.STDOUT)
        tenth, most = 0, 0.0
        while job.poll() is None:
            with suppress(psutil.Error):
                most = max(most, _memory(job))
            done = 0
            with suppress(FileNotFoundError):
                done = sum(1 for _ in (out / ".plan" / "slides").iterdir())
            while tenth < 10 and done * 10 >= count * (tenth + 1):
                tenth += 1
                sys.stdout.write(f"{tenth * count // 10:7} slides {time.monotonic() - began:8.1f} s {most:6.2f} GB\n")
                sys.stdout.flush()
                most = 0.0
            time.sleep(_EVERY_S)
    if job.returncode:
        raise SystemExit(output.read_text()[-3000:])
    seconds, cpu = time.monotonic() - began, children_cpu() - used
    sys.stdout.write(f"    all      {seconds:8.1f} s {most:6.2f} GB, {cpu / count * 1e3:.1f} CPU ms a slide\n")
    sys.stdout.write(output.read_text()[-1500:])


def main() -> None:
    """Make slides, and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--slides", type=int, default=10_000, help="number of slides")
    parser.add_argument("--copies", action="store_true", help="hard links of one slide")
    settings, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "slides"
        write_slides(folder, settings.slides, settings.copies)
        measure(folder, settings.slides, Path(scratch) / "out", flags)


if __name__ == "__main__":
    main()
