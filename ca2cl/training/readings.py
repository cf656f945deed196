"""A step's numbers on their way from the device to the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ca2cl.training.engine import OptimizerStep


class Reading:
    """Terms, gradient norm and skip flag of one step, copied to the host as one vector.

    On a GPU the copy starts here and nobody waits for it until the numbers are asked for: a loop that asks a step later
    never lets the device run dry.

    Args:
        terms: scalars by name.
        outcome: of the optimizer step.
        line: what else the journal says of the step.
    """

    def __init__(self, terms: Mapping[str, Tensor], outcome: OptimizerStep, line: dict[str, Any]) -> None:
        self.line, self._names = line, [*terms]
        device = outcome.grad_norm.device
        values = [value.to(device, torch.float64) for value in (*terms.values(), *outcome)]
        self._values = torch.stack(values).to("cpu", non_blocking=True)
        self._ready = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def read(self) -> tuple[dict[str, float], float, bool]:
        """Terms, gradient norm, and whether the step was skipped."""
        if self._ready is not None:
            self._ready.synchronize()
        *terms, norm, skipped = self._values.tolist()
        return dict(zip(self._names, terms, strict=True)), norm, bool(skipped)
