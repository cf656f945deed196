"""The ranks of a launch: who is where, and whether they reach one another."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object

from ca2cl.checks.finding import Finding
from ca2cl.errors import LocalError


def launched() -> bool:
    """Whether a launcher started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def meet(patience_s: float) -> tuple[int, list[Finding]]:
    """Join the other ranks, add up their numbers, and compare notes; returns this rank and what was found.

    Raises:
        LocalError: they do not meet within ``patience_s`` seconds.
    """
    try:
        accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=patience_s))])
        rank, world = accelerator.process_index, accelerator.num_processes
        total = int(accelerator.reduce(torch.tensor([rank + 1.0], device=accelerator.device), reduction="sum"))
        here = f"{socket.gethostname()}, {accelerator.device}, local rank {accelerator.local_process_index}"
        places = gather_object([(rank, here)])
    except RuntimeError as error:
        address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        raise LocalError(
            f"rank {os.environ.get('RANK', '?')}: no all-reduce within {patience_s:g} s through {address} "
            f"({str(error).splitlines()[0]}); check the address, the port and the firewall, and GLOO_SOCKET_IFNAME or "
            "NCCL_SOCKET_IFNAME"
        ) from None
    findings = [Finding(f"rank {number}", "ok", place) for number, place in sorted(places)]
    if total != world * (world + 1) // 2:
        findings.append(
            Finding("all-reduce", "wrong", f"the ranks' sum is {total}", "update the GPUs' driver and NCCL")
        )
    else:
        findings.append(Finding("all-reduce", "ok", f"{world} ranks agree"))
    return rank, findings
