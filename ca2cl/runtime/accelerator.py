"""Build accelerate's ``Accelerator`` and check which ranks joined."""

from __future__ import annotations

import contextlib
import os
import socket
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ca2cl.errors import InputError, LocalError
from ca2cl.runtime.launched import (
    RENDEZVOUS,
    Place,
    find_place,
    forget_place,
    keeps_to_cpu,
    under_deepspeed,
    unseen_gpus,
)
from ca2cl.runtime.variables import settle_variables


def build_accelerator(patience: timedelta = timedelta(minutes=30)) -> Accelerator:
    """The accelerator of this process, joined to the others of its launch.

    It computes on this process's GPU, or on the CPU where there is none or none is to be used.

    Args:
        patience: how long the processes wait for one another, here and in every collective.

    Raises:
        InputError: they do not meet, or some have a GPU and others none.
    """
    # Half precision is ours, not accelerate's: by autocast over fp32 weights and torch's loss scaling it is the same on
    # every engine and device. DeepSpeed's own would make every buffer of BatchNorm a half-precision one, and
    # accelerate's fp16 wants a GPU.
    # broadcast_buffers=False: with several forwards before one backward DDP would write BatchNorm's buffers in place
    # between them (pytorch#175024); ours need no broadcast, every rank computes the same ones.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # by every process
    place = _settle_place()
    settle_variables()
    on_gpu = torch.cuda.is_available() and not keeps_to_cpu()
    # gloo on CPUs: DeepSpeed would take oneCCL, and accelerate MPI where torch was built with it.
    backend = {"backend": "gloo"} if not on_gpu and (place.world > 1 or under_deepspeed()) else {}
    try:
        store = _meet(place, on_gpu, patience)
        accelerator = Accelerator(
            mixed_precision="no",
            # Several processes on CPUs join only with cpu=True (accelerate 1.15), and DeepSpeed only without.
            cpu=not on_gpu and not under_deepspeed(),
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=patience, **backend),
            ],
        )
    except RuntimeError as error:  # of torch's rendezvous and process group
        if place.world == 1:
            raise
        raise unmet(place, error, patience) from None
    del store
    check_joined(place, accelerator.num_processes)
    if accelerator.device.type not in ("cpu", "cuda"):
        raise InputError(f"accelerate chose the device {accelerator.device}: ca2cl computes on CUDA GPUs or CPUs")
    if accelerator.device.type == "cpu" and accelerator.num_processes > 2:
        # There are none, but DDP then leaves its buckets as they are. Otherwise it sorts them anew after a job's first
        # backward pass, and on three processes or more a sum's order, and so its rounding, depends on where in a bucket
        # it lies: a job that goes on from a checkpoint would part from one that was left alone. (On GPUs, where
        # nothing was promised or measured, large buckets stay.) It costs a line of torch's on every process.
        accelerator.ddp_handler.find_unused_parameters = True
    return accelerator


def _settle_place() -> Place:
    """This process's place, with an environment in which accelerate finds the same."""
    place = find_place()
    if under_deepspeed():
        if not all(os.environ.get(name) for name in RENDEZVOUS):
            raise LocalError(
                "ACCELERATE_USE_DEEPSPEED is set, but no launcher started this process: use `accelerate launch "
                "--config_file accelerate_configs/deepspeed_zero2.yaml`, or unset it"
            )
        if keeps_to_cpu() and torch.cuda.is_available():
            raise LocalError(
                "ACCELERATE_USE_CPU is set, and accelerate leaves DeepSpeed out then: unset it, or use "
                "accelerate_configs/cpu.yaml"
            )
        os.environ["ACCELERATE_USE_CPU"] = "false"
    elif place.world == 1:
        forget_place()
    return place


def _meet(place: Place, on_gpu: bool, patience: timedelta) -> Any:
    """The store in which every process has written its kind of device (to be kept until they have joined).

    NCCL on one machine and gloo on another, whose driver is gone, would wait for each other until the patience ends.
    """
    if place.world == 1 or dist.is_initialized():
        return None
    if not on_gpu and not keeps_to_cpu() and (gpus := unseen_gpus()):
        raise LocalError(
            f"rank {place.rank} on {socket.gethostname()}: there are {gpus} NVIDIA GPUs, but torch sees none; see "
            "nvidia-smi and `ca2cl doctor`, or use accelerate_configs/cpu.yaml to compute on the CPU"
        )
    store, *_ = next(rendezvous("env://", timeout=patience))
    written = PrefixStore("ca2cl-device", store)
    ranks = [str(rank) for rank in range(place.world)]
    written.set(str(place.rank), f"a {'GPU' if on_gpu else 'CPU'} on {socket.gethostname()}")
    devices = [device.decode() for device in written.multi_get(ranks)]
    have_read = PrefixStore("ca2cl-device-read", store)
    have_read.set(str(place.rank), "")
    for rank, device in enumerate(devices):
        if device[:5] != devices[0][:5]:
            if place.rank == 0:  # its store ends with it: not before the others have read the reason
                with contextlib.suppress(RuntimeError):
                    have_read.wait(ranks, min(patience, timedelta(seconds=10)))
            raise InputError(
                f"rank 0 has {devices[0]}, but rank {rank} has {device}: all must have a GPU, or none; see nvidia-smi "
                "and `ca2cl doctor` there"
            )
    return store


def check_joined(place: Place, processes: int) -> None:
    """Refuse a launch of which accelerate joined only a part.

    Raises:
        LocalError: ``processes``, accelerate's count, is another than the launcher's.
    """
    if processes != place.world:
        raise LocalError(
            f"rank {place.rank}: WORLD_SIZE is {place.world}, but accelerate joined {processes} of them; update it, or "
            "use a file of accelerate_configs/"
        )


def unmet(place: Place, error: Exception, patience: timedelta | None = None) -> LocalError:
    """The error of a launch whose processes do not reach one another."""
    address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    within = f" within {patience.total_seconds():g} s" if patience else ""
    return LocalError(
        f"rank {place.rank} of {place.world} does not meet the others{within} through {address} "
        f"({str(error).splitlines()[0]}); check the address, the port and the firewall, and "
        "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
    )
