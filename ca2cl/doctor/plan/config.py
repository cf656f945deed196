"""Settings of ``ca2cl doctor --plan``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from annotated_types import Ge, Gt

from ca2cl.common.ranges import check_ranges
from ca2cl.errors import InputError
from ca2cl.pretrain.config import PretrainConfig


@dataclass(frozen=True, kw_only=True)
class PlanConfig(PretrainConfig):
    """Print the memory of each process of a planned pre-training job, with the settings of ``ca2cl pretrain``.

    For every engine: weights, gradients, optimizer state and views, and the peak by micro-batch. Activations are those
    of the method's own step, which is run on tensors without numbers. It needs no data and no GPU.
    """

    processes: int = 1
    """Number of processes of the planned job."""
    memory_gb: float | None = None
    """Memory of a device in 10^9 bytes: what does not fit is marked. none: that of this machine's first GPU, if any."""
    device: Literal["gpu", "cpu"] = "gpu"
    """Kind of device of the planned job. On a GPU DeepSpeed's buffer for gradients takes memory before it is filled."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, processes=Ge(1), memory_gb=Gt(0))
        if self.run.batch_size % self.processes:
            raise InputError(
                f"processes is {self.processes}: it must divide run.batch_size {self.run.batch_size}; use a multiple"
            )
