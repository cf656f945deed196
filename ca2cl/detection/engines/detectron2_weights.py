"""Convert an encoder's weights to detectron2's ResNet backbone.

Names as in detectron2's ``modeling/backbone/resnet.py``: a stem, stages res2 to res5, and every normalisation inside
the convolution that it follows. Only ``load_backbone`` needs detectron2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ca2cl.common.optional import need
from ca2cl.errors import InputError
from ca2cl.models.resnet import ARCHITECTURES

COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"
"""Of 2026-06-06, the one that this code was tried with; the release 0.6 of 2021 was not."""
RECIPE = (
    "it has no wheels, build it: pip install --no-build-isolation "
    f"git+https://github.com/facebookresearch/detectron2@{COMMIT[:12]}"
)
_COUNTER = "num_batches_tracked"
_RULES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^(?!layer\d)", "stem."),
    (r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}"),
    (r"\bbn(\d)\.", r"conv\1.norm."),
    (r"\bdownsample\.0\.", "shortcut."),
    (r"\bdownsample\.1\.", "shortcut.norm."),
)


def detectron2_name(name: str) -> str:
    """Name in detectron2 of a tensor of torchvision's ResNet: ``layer1.0.bn2.bias`` is ``res2.0.conv2.norm.bias``."""
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name


def detectron2_names(names: Iterable[str]) -> dict[str, str]:
    """torchvision's name → detectron2's, one to one, of all tensors but BatchNorm's step counters.

    Those are not part of any result, detectron2's frozen BatchNorm has none, and its checkpointer would list each as a
    key that the model does not use.
    """
    renamed = {name: detectron2_name(name) for name in names if not name.endswith(_COUNTER)}
    assert len(set(renamed.values())) == len(renamed)
    return renamed


def checkpoint(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Content of a ``.pth`` for ``DetectionCheckpointer``: tensors and plain values, no pickled object.

    ``matching_heuristics`` has the checkpointer find the names inside a detector (``backbone.bottom_up.res2…``); for a
    ``.pth`` it takes that word from the file itself.
    """
    tensors = {there: state[here] for here, there in detectron2_names(state).items()}
    return {"model": tensors, "__author__": "ca2cl", "matching_heuristics": True}


def settings(arch: str, mean: Sequence[float], std: Sequence[float], weights: Path | None = None) -> dict[str, Any]:
    """The part of a detectron2 configuration without which the weights would mean something else.

    Args:
        mean: of the channels, in [0, 1]; detectron2 counts from 0 to 255.
        std: of the channels.

    Raises:
        InputError: detectron2 has no such backbone.
    """
    if arch not in ARCHITECTURES:
        raise InputError(
            f"detectron2 has no {arch}, only {', '.join(ARCHITECTURES)}; export --to timm or onnx, or train a detector "
            "on it with `ca2cl detect --engine detectron2`"
        )
    depth = int(arch.removeprefix("resnet"))
    resnets: dict[str, Any] = {
        "DEPTH": depth,
        "STRIDE_IN_1X1": False,  # torchvision strides in the 3x3 convolution, detectron2's default is MSRA's 1x1
        "OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    }
    if depth < 50:
        resnets["RES2_OUT_CHANNELS"] = 64  # detectron2 refuses depth 18 and 34 without it
    model = {"WEIGHTS": "" if weights is None else str(weights), **pixel_settings(mean, std), "RESNETS": resnets}
    return {"VERSION": 2, "MODEL": model, "INPUT": {"FORMAT": "RGB"}}


def pixel_settings(mean: Sequence[float], std: Sequence[float]) -> dict[str, list[float]]:
    """Normalisation of the input under ``MODEL``.

    Args:
        mean: of the channels, in [0, 1]; detectron2 counts from 0 to 255.
        std: of the channels.
    """
    return {
        "PIXEL_MEAN": [round(255 * value, 6) for value in mean],
        "PIXEL_STD": [round(255 * value, 6) for value in std],
    }


def load_backbone(weights: Path, config: Path) -> Callable[[Tensor], Tensor]:
    """detectron2's own backbone with the weights that its own checkpointer reads.

    Returns:
        Tiles (B, 3, S, S), RGB in [0, 1] → the mean of res5 over positions, (B, D).

    Raises:
        MissingPackage: detectron2 is not installed.
    """
    module = {name: need(f"detectron2.{name}", RECIPE) for name in ("config", "checkpoint", "layers", "modeling")}
    cfg = module["config"].get_cfg()
    cfg.merge_from_file(str(config), allow_unsafe=False)  # by default it runs the code that a tag names
    backbone = module["modeling"].build_resnet_backbone(cfg, module["layers"].ShapeSpec(channels=3)).eval()
    module["checkpoint"].DetectionCheckpointer(backbone).load(str(weights))
    mean, std = (
        torch.tensor(values, dtype=torch.float32).view(3, 1, 1)
        for values in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    )

    def features(tiles_BCHW: Tensor) -> Tensor:
        pooled: Tensor = backbone((255 * tiles_BCHW - mean) / std)["res5"].mean((2, 3))
        return pooled

    return features
