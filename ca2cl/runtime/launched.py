"""Rank, world size and devices that a launcher assigned."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from ca2cl.errors import LocalError

RENDEZVOUS = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables that processes need to meet, beside WORLD_SIZE."""
_COUNTS = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_PCI = Path("/sys/bus/pci/devices")
_NVIDIA, _DISPLAY = "0x10de", "0x03"


class Place(NamedTuple):
    """Number of this process and how many there are: in the whole job, and on this machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


def find_place() -> Place:
    """This process's place in its launch; 0 of 1 where no launcher started several.

    WORLD_SIZE decides. Without it RANK and LOCAL_RANK mean nothing here: training operators set RANK to the pod's
    number, and a shell or a notebook keeps what a launcher once set.

    Raises:
        LocalError: WORLD_SIZE is above 1, and a variable that the processes need to meet is not set; or accelerate
            was asked for several processes and made one, as it does without a GPU.
    """
    world = _number("WORLD_SIZE", 1)
    if world <= 1:
        if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
            raise LocalError(
                "accelerate launch was to start several processes and started one: give it --multi_gpu, or for CPUs "
                "--config_file accelerate_configs/cpu.yaml; if it was to start one, unset MASTER_ADDR"
            )
        return Place()
    missing = [name for name in RENDEZVOUS if not os.environ.get(name)]
    if missing:
        raise LocalError(
            f"WORLD_SIZE is {world}, but not set: {', '.join(missing)}; start by `accelerate launch` or `ca2cl launch`"
            ", which set them all, or unset WORLD_SIZE to run as one process"
        )
    return Place(_number("RANK"), world, _number("LOCAL_RANK"), _number("LOCAL_WORLD_SIZE", world))


def launched_rank() -> int:
    """Number of a process that a launcher started beside others; 0 for any other process, whatever RANK says."""
    try:
        return find_place().rank
    except LocalError:
        return 0


def forget_place() -> None:
    """Take what a launcher sets out of the environment, for a process that belongs to no launch, and what it starts.

    accelerate and torch read it by rules of their own: a LOCAL_RANK, or the count of an MPI job, and one process waits
    for others.
    """
    for name in (*RENDEZVOUS, *_COUNTS):
        os.environ.pop(name, None)


def _number(name: str, default: int = 0) -> int:
    value = os.environ.get(name) or str(default)
    if not value.isdecimal():
        raise LocalError(f"{name} is {value!r} in the environment: a launcher sets it to a number; unset it")
    return int(value)


def under_deepspeed() -> bool:
    """True if the launcher chose DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def keeps_to_cpu() -> bool:
    """True if GPUs are not to be used: by accelerate's configuration, or because none is visible."""
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes", "on", "y", "t"):
        return True
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible is not None and (not visible.strip() or visible.strip().startswith("-"))


def unseen_gpus(devices: Path = _PCI) -> int:
    """Number of NVIDIA GPUs on the PCI bus. Where torch sees none, they lack a driver or torch lacks CUDA."""
    return sum(
        _read(device / "vendor") == _NVIDIA and _read(device / "class").startswith(_DISPLAY)
        for device in devices.glob("*")
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
