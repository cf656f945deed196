"""Memory available to a process, and its peak use."""

from __future__ import annotations

import math
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

_LIMITS = {"VmData": resource.RLIMIT_DATA, "VmSize": resource.RLIMIT_AS}
_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def free_bytes(device: torch.device) -> int:
    """Bytes available to this process: of GPU memory, or of RAM and swap within its cgroups."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    machine = psutil.virtual_memory().available + psutil.swap_memory().free
    return int(min([machine, *_left_in_cgroups(_CGROUPS, _OWN_CGROUPS)]))


def limit_left() -> float:
    """Bytes of memory that ``ulimit -d`` and ``ulimit -v`` leave to this process; infinity without a limit."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    limits = {name: resource.getrlimit(kind)[0] for name, kind in _LIMITS.items()}
    left = [
        limit - int(status[name].split()[0]) * 1024 for name, limit in limits.items() if limit != resource.RLIM_INFINITY
    ]
    return float(max(0, min(left))) if left else math.inf


def _left_in_cgroups(root: Path, own: Path) -> Iterator[int]:
    """Bytes left to each of this process's cgroups that has a limit, of version 1 or 2; file caches give way."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        names = ("memory.max", "memory.current", "inactive_file")
        if "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        elif controllers:
            continue
        base = root / "memory" if controllers else root
        inside = base / path.lstrip("/")
        # in a container the path may be the host's: then what is mounted is the container's own
        for folder in {base, inside, *(one for one in inside.parents if one.is_relative_to(base))}:
            left = _left(folder, *names)
            if left is not None:
                yield left


def _left(folder: Path, most: str, used: str, cache: str) -> int | None:
    try:
        limit, taken = ((folder / name).read_text(encoding="utf-8").strip() for name in (most, used))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
        return None if limit == "max" else max(0, int(limit) - int(taken) + int(stat.get(cache, 0)))
    except (OSError, ValueError):
        return None


def peak_bytes() -> int:
    """Peak memory of this process in bytes, of its GPU where it uses one."""
    on_gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return int(on_gpu) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
