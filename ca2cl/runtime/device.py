"""Choose the device of evaluation, and copy tensors to it."""

from __future__ import annotations

import torch
from torch import Tensor

from ca2cl.errors import InputError
from ca2cl.runtime.launched import find_place, keeps_to_cpu
from ca2cl.runtime.variables import settle_variables


def find_device(name: str) -> torch.device:
    """The device that ``name`` (auto, cpu, cuda or cuda:N) stands for.

    ``auto`` is the GPU of this process's number on its host where a launcher started several, the only or first GPU
    where none did, and the CPU where there is none or the launcher was started to use it.

    Raises:
        InputError: it is not there, or the environment would make other numbers of it (``settle_variables``).
    """
    settle_variables()
    if name == "auto":
        if keeps_to_cpu() or not torch.cuda.is_available():
            return torch.device("cpu")
        name = f"cuda:{find_place().local_rank % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # torch asserts where it was built without CUDA
        raise InputError(f"device is {name!r}: not there; use auto or cpu") from None
    return device


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """``values`` of the host on ``device``; to a GPU from pinned memory, without the host waiting for it."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
