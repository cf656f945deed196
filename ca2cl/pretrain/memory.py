"""Estimate a step's memory and compare it with what there is."""

from __future__ import annotations

import logging
import math
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from ca2cl.errors import InputError
from ca2cl.models.backbone import Backbone, outline
from ca2cl.runtime.launched import find_place, launched_rank

logger = logging.getLogger(__name__)
_TRIED_ROWS, _TRIED_SIZE = 1, 64
_SURE, _LIKELY = 0.9, 1.6
"""A step takes at least so much of the estimate, and often so much: a ResNet-18's at 96 px takes 1.5 on a CPU."""
_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def bytes_a_tile(
    build: Callable[[Backbone], nn.Module],
    arch: str,
    image_size: int,
    precision: str,
    *,
    recomputed: bool = False,
    graphs: int = 2,
) -> float:
    """Bytes that autograd saves for one tile in one pass, extrapolated from small tiles by the number of pixels.

    Args:
        build: of the method, the network around an encoder.
        arch: of the encoder.
        image_size: side of the tile in pixels.
        precision: that of the job.
        recomputed: blocks keep their input only. The one whose backward pass is under way has its activations, too; of
            all passes whose graphs a step holds it is one at a time.
        graphs: how many these are (``Method.graphs``).
    """
    encoder = outline(arch, "frozen", image_size=image_size)  # sync would wait for the other ranks
    tried = math.ceil(_TRIED_SIZE / encoder.patch_size) * encoder.patch_size
    if tried != image_size:
        encoder = outline(arch, "frozen", image_size=tried)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        network = build(encoder).train()
    network = network.to_empty(device="cpu")
    for tensor in (*network.parameters(), *network.buffers()):  # its values do not matter, and take time to draw
        tensor.data.zero_()
    network.autocast_dtype = None if precision == "no" else torch.bfloat16  # type: ignore[assignment]  # fp16 is as large, and slow on CPUs
    blocks = encoder.blocks() if recomputed else []
    one, two = (_kept_bytes(network, rows * _TRIED_ROWS, tried, blocks) for rows in (1, 2))
    of_blocks = max((b - a for a, b in zip(one[1:], two[1:], strict=True)), default=0)
    return (two[0] - one[0] + of_blocks / graphs) / _TRIED_ROWS * (image_size / tried) ** 2


class _Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes of what autograd saves inside this context."""

    def __init__(self) -> None:
        super().__init__(self.keep, lambda tensor: tensor)
        self._bytes: dict[int, int] = {}
        self._alive: list[Tensor] = []  # an address must not be reused while counting

    def keep(self, tensor: Tensor) -> Tensor:
        """``tensor``, counted."""
        storage = tensor.untyped_storage()
        self._bytes[storage.data_ptr()] = storage.nbytes()
        self._alive.append(tensor)
        return tensor

    def total(self) -> int:
        """Bytes so far."""
        return sum(self._bytes.values())


def _kept_bytes(network: nn.Module, rows: int, size: int, blocks: Sequence[nn.Module] = ()) -> list[int]:
    """Bytes that a pass saves, of ``blocks`` only their inputs; then the bytes inside each of ``blocks``."""
    whole, inside = _Saved(), [_Saved() for _ in blocks]
    with ExitStack() as hooks, whole:
        for block, counter in zip(blocks, inside, strict=True):
            hooks.callback(block.register_forward_pre_hook(partial(_enter, whole, counter)).remove)
            hooks.callback(block.register_forward_hook(partial(_leave, counter)).remove)
        network(torch.zeros(rows, 3, size, size))
    return [whole.total(), *(counter.total() for counter in inside)]


def _enter(whole: _Saved, counter: _Saved, block: nn.Module, args: tuple[Any, ...]) -> None:
    for value in args:
        if isinstance(value, Tensor):
            whole.keep(value)
    counter.__enter__()


def _leave(counter: _Saved, *_: Any) -> None:
    counter.__exit__(None, None, None)


def check_memory(a_tile: float, graphs: int, micro_batch: int, share: int, device: torch.device) -> None:
    """Log a step's memory, warn if it may not fit, and refuse it if it cannot.

    Args:
        a_tile: of ``bytes_a_tile``.
        graphs: passes of a micro-batch whose graphs a step holds at a time (``Method.graphs``).
        micro_batch: tiles that a process holds at a time.
        share: its tiles of a batch.

    Raises:
        InputError: it cannot fit.
    """
    step, processes = graphs * micro_batch * a_tile, find_place().local_world if device.type == "cpu" else 1
    free = free_bytes(device) / processes
    estimate = (
        f"a step holds about {_size(step)} of {'GPU ' if device.type == 'cuda' else ''}memory, for {graphs} passes of "
        f"{micro_batch} tiles at a time; {_size(free)} are free{' for each process' if processes > 1 else ''}"
    )
    fits = int(free / _LIKELY / graphs / a_tile)
    smaller = max((size for size in range(2, min(fits, share) + 1) if share % size == 0), default=0)
    remedy = "use a smaller --run.batch_size or --data.image_size, or more processes"
    if smaller:
        remedy = f"use --run.micro_batch_size {smaller} or less (with --model.norm lane_group), or more processes"
    if _SURE * step > free:
        whole = ", a process's whole share of the batch" if micro_batch == share else ""
        raise InputError(f"run.micro_batch_size is {micro_batch}{whole}: {estimate}; {remedy}")
    if _LIKELY * step > free:
        logger.warning("%s, which may not be enough: %s", estimate, remedy)
    elif launched_rank() == 0:
        logger.info(estimate)


def free_bytes(device: torch.device) -> int:
    """Bytes available to this process: of GPU memory, or of RAM and swap within its cgroups."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    machine = psutil.virtual_memory().available + psutil.swap_memory().free
    return int(min([machine, *_left_in_cgroups(_CGROUPS, _OWN_CGROUPS)]))


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


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"
