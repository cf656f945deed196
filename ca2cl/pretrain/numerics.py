"""Choose numerics; fix and record those that ``accumulation bitwise`` depends on.

Sums are evaluated in an order that depends on the number of threads and on the kernels. Launchers give their processes
one thread each, while a bare process uses all cores.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from ca2cl.errors import InputError
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.runtime.precision import HALF

_CHOOSE_KERNELS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS")


def fix_numerics(device: torch.device) -> dict[str, str]:
    """Fix what can be fixed in this process, and describe all of it.

    One thread for each process: more cores are used by more processes, with the same result. GPUs take deterministic
    kernels where there are any, and no TF32.

    Returns:
        Everything that the last bits depend on, by name: a run resumes bit for bit where these are equal.
    """
    torch.set_num_threads(1)
    found = {"torch": torch.__version__, "threads": str(torch.get_num_threads())}
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = False
        cudnn = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
        return found | {"device": torch.cuda.get_device_name(device), "CUDA": str(torch.version.cuda), "cuDNN": cudnn}
    found |= {
        "device": _cpu(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "oneDNN": str(torch.backends.mkldnn.enabled),
    }
    return found | {name: os.environ[name] for name in _CHOOSE_KERNELS if name in os.environ}


def choose_kernels(device: torch.device, *, tf32: bool) -> None:
    """Let cuDNN choose the fastest kernels by trial, and set whether fp32 is rounded to TF32. For GPUs only."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = tf32
        torch.set_float32_matmul_precision("high" if tf32 else "highest")


def views_dtype(config: PretrainConfig) -> torch.dtype:
    """The precision to which autocast rounds the network's input; fp32 for the sums of ``bitwise``."""
    run = config.run
    return HALF.get(run.precision, torch.float32) if run.accumulation != "bitwise" else torch.float32


def check_numerics(here: dict[str, str], there: dict[str, str], whose: str) -> None:
    """Compare two results of ``fix_numerics``.

    Raises:
        InputError: they differ.
    """
    for name in sorted(here.keys() | there.keys()):
        ours, theirs = here.get(name, "not set"), there.get(name, "not set")
        if ours != theirs:
            raise InputError(
                f"run.accumulation is bitwise, but {name} is {ours!r} here and {theirs!r} {whose}: the last bits would "
                "differ; use the same, or begin a run with --run.accumulation exact"
            )


def _cpu() -> str:
    """The processor's model: oneDNN chooses kernels by its caches and instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
