"""Feature maps of timm's bodies, and their strides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ca2cl.models.features import Level

_FINEST = 4


def find_levels(body: Any) -> dict[Level, int]:
    """The last map of each stride from 4, from fine to coarse, with its index for ``forward_intermediates``; empty for
    a body without such maps."""
    infos = getattr(body, "feature_info", None)
    if infos is None or not hasattr(body, "forward_intermediates"):
        return {}
    rows = infos.get_dicts() if hasattr(infos, "get_dicts") else infos
    last = {row["reduction"]: (Level(row["num_chs"], row["reduction"]), index) for index, row in enumerate(rows)}
    return dict(last[stride] for stride in sorted(last) if stride >= _FINEST)


def find_maps(body: Any, x_BCHW: Tensor, indices: Sequence[int]) -> list[Tensor]:
    """Maps (B, C, h, w) at ``indices``, as the stages give them; of a plain body behind its last norm, without which a
    pre-norm ViT's features have no scale of their own."""
    maps: list[Tensor] = body.forward_intermediates(
        x_BCHW, indices=list(indices), norm=len(indices) == 1, stop_early=True, intermediates_only=True
    )
    return maps


def keep_windows(body: nn.Module) -> None:
    """Let windows of a Swin keep their size, and every second block shift them, on images of any size.

    At the tiles' size a stage whose map is one window does not shift.
    """
    for module in body.modules():
        block: Any = module
        if all(hasattr(block, name) for name in ("always_partition", "input_resolution", "set_input_size")):
            block.set_input_size(block.input_resolution, block.window_size, always_partition=True)
