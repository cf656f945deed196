"""Adapt a checkpoint to a timm model by timm's own filter.

The filter renames what the model's first authors called otherwise (DINOv2 and DINOv3, Swin, ConvNeXt, EVA, ...), and
resamples position embeddings and tables of relative positions to the model's size.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

_FILTER = "checkpoint_filter_fn"
"""Name that the filter has in every module of ``timm.models`` that needs one."""
_DINOV2, _REGISTERS = "mask_token", "register_tokens"


def adapted(body: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` under the names and in the shapes of ``body``, as far as timm knows how.

    Tensors that pre-training alone needs (``mask_token``) are left out. A state that timm's filter does not know comes
    back as it is.
    """
    convert = _filter_of(body)
    given = dict(state)
    if convert is None:
        return given
    if _REGISTERS in given and _DINOV2 not in given:
        given[_DINOV2] = given[_REGISTERS][:, 0]  # by which the filter knows DINOv2, and which it drops
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # EVA's prints the tensors that it looks for
            found: dict[str, Tensor] = convert(given, body)
    except (KeyError, AttributeError, RuntimeError, ValueError, IndexError, AssertionError):
        return dict(state)  # not a state that it knows: what does not fit is said by name
    kernels = {name: one for name, one in state.items() if one.ndim == 4 and name in found}
    return {**found, **kernels}  # at their own size: patches of another one are another architecture


def _filter_of(body: nn.Module) -> Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None:
    for kind in type(body).__mro__:  # a subclass in another module may have none of its own
        module = sys.modules.get(kind.__module__)
        convert: Any = getattr(module, _FILTER, None)
        if kind.__module__.startswith("timm.models") and convert is not None:
            break
    else:
        return None
    if "adapt_layer_scale" in inspect.signature(convert).parameters:
        return lambda state, model: convert(state, model, adapt_layer_scale=True)
    found: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] = convert
    return found
