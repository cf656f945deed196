"""Check environment variables that change results in other libraries.

Each is refused, or taken out of the environment before it is read; ``tests/unit/runtime/test_variables.py`` has a
verdict on every variable in accelerate's source. What a setting of ours decides is decided by it alone, and said where
they differ.
"""

from __future__ import annotations

import logging
import os

import torch

from ca2cl.errors import InputError
from ca2cl.runtime.launched import launched_rank

logger = logging.getLogger(__name__)

KEPT = (
    "ACCELERATE_USE_CPU",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_DEEPSPEED_",
    "ACCELERATE_CONFIG_DS_FIELDS",
    "ACCELERATE_CPU_AFFINITY",
    "ACCELERATE_DEBUG_MODE",
    "ACCELERATE_LOG_LEVEL",
)
"""Beginnings of what accelerate may read: device, DeepSpeed (which ``DeepSpeedEngine`` checks), and what only shows."""
_OURS = {
    "ACCELERATE_MIXED_PRECISION": ("no", "run.precision"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "run.micro_batch_size"),
    "ACCELERATE_GRADIENT_CLIPPING": ("none", "optim.clip_norm"),
}
"""The value that changes nothing, and the setting that decides instead."""
_DDP = "ca2cl trains by DDP, DeepSpeed's ZeRO-1 and ZeRO-2, or --run.fsdp true; use a file of accelerate_configs/"
_EXACT = "fp32 would not be fp32; unset it, and choose by run.precision"
REFUSED = {
    "ACCELERATE_USE_FSDP": ("false", _DDP),
    "ACCELERATE_USE_MEGATRON_LM": ("false", _DDP),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("false", _DDP),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "ca2cl compiles nothing; use --dynamo_backend no"),
    "NVIDIA_TF32_OVERRIDE": ("0", _EXACT),
    "ONEDNN_DEFAULT_FPMATH_MODE": ("strict", _EXACT),
    "DNNL_DEFAULT_FPMATH_MODE": ("strict", _EXACT),
}
"""The value that changes nothing, and what to do about another."""


def settle_variables() -> None:
    """Leave in this process's environment only what no result depends on. Call it before accelerate reads it.

    Raises:
        InputError: something is asked for that ca2cl does not do.
    """
    for name, (harmless, remedy) in REFUSED.items():
        value = os.environ.get(name, harmless)
        if value.lower() != harmless:
            raise InputError(f"{name} is {value!r} in the environment: {remedy}")
    for name, (harmless, setting) in _OURS.items():
        value = os.environ.get(name, harmless)
        if value.lower() != harmless and launched_rank() == 0:
            logger.warning("%s is %s in the environment: left out, %s decides", name, value, setting)
    for name in [name for name in os.environ if name.startswith("ACCELERATE_") and not name.startswith(KEPT)]:
        del os.environ[name]
    # What TORCH_ALLOW_TF32_CUBLAS_OVERRIDE has changed when torch was imported; NVIDIA's containers set it.
    torch.set_float32_matmul_precision("highest")
