"""Check a launch: which ranks there are, and whether they connect."""

from __future__ import annotations

import socket
from datetime import timedelta

import torch
from accelerate.utils import gather_object

from ca2cl.doctor.finding import Finding
from ca2cl.runtime.accelerator import build_accelerator, unmet
from ca2cl.runtime.launched import find_place


def meet(patience_s: float) -> tuple[int, list[Finding]]:
    """Join the other ranks as training does, add up their numbers, compare notes, and part again; returns this rank and
    what was found, which is nothing where no launcher started several processes.

    Raises:
        LocalError: they do not meet within ``patience_s`` seconds.
    """
    place, patience = find_place(), timedelta(seconds=patience_s)
    if place.world == 1:
        return 0, []
    accelerator = build_accelerator(patience)
    try:
        total = int(accelerator.reduce(torch.tensor([place.rank + 1.0], device=accelerator.device), reduction="sum"))
        here = f"{socket.gethostname()}, {accelerator.device}, local rank {accelerator.local_process_index}"
        places = gather_object([(place.rank, here)])
    except RuntimeError as error:
        raise unmet(place, error, patience) from None
    accelerator.end_training()  # what follows is one rank's alone, and a step would wait for the others
    findings = [Finding(f"rank {number}", "ok", where) for number, where in sorted(places)]
    if total != place.world * (place.world + 1) // 2:
        findings.append(
            Finding("all-reduce", "wrong", f"the ranks' sum is {total}", "update the GPUs' driver and NCCL")
        )
    else:
        findings.append(Finding("all-reduce", "ok", f"{place.world} ranks agree"))
    return place.rank, findings
