"""``config.json`` of a model on the hub: architecture, input and licence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Gt, Len

from ca2cl.common.records import Number, read_record
from ca2cl.errors import InputError
from ca2cl.models.timm.spelling import ARGUMENTS, join_arch, timm_name
from ca2cl.weights.transformers_config import PREPROCESSOR, is_transformers_config, read_architecture, read_input

CONFIG = "config.json"
_NOT_STRUCTURE = (
    "attn_drop_rate", "drop_path_rate", "drop_rate", "dynamic_img_size", "head_dropout", "img_size", "in_chans",
    "num_classes", "patch_drop_rate", "pos_drop_rate", "pretrained", "proj_drop_rate", "strict_img_size", "weight_init",
)  # fmt: skip
"""Arguments that do not change which tensors a body without classifier has."""
Triple = Annotated[tuple[Number, ...], Len(3, 3)]


@dataclass(frozen=True, kw_only=True)
class _Pretrained:
    mean: Triple | None = None
    std: Annotated[tuple[Annotated[Number, Gt(0)], ...], Len(3, 3)] | None = None
    input_size: Annotated[tuple[int, ...], Len(3, 3)] | None = None
    mpp: Annotated[Number, Gt(0)] | None = None
    license: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Config(_Pretrained):
    architecture: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    pretrained_cfg: _Pretrained | None = None


@dataclass(frozen=True, kw_only=True)
class Stated:
    """What weights state about themselves; None where they do not.

    Attributes:
        arch: as ``model.arch``.
        mean: of the channels of their input, in [0, 1].
        std: of the channels.
        input_size: side in pixels.
        mpp: micrometres a pixel.
        licence: by its name.
    """

    arch: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    input_size: int | None = None
    mpp: float | None = None
    licence: str | None = None


def read_config(path: Path | None, source: str, find: Callable[[str], Path | None]) -> Stated:
    """What a ``config.json`` of timm or transformers states; nothing where there is none, or it is of another model.

    Args:
        path: of the file.
        source: name of the weights, for messages.
        find: gives the path of another file beside it, or None.

    Raises:
        InputError: damaged, an unknown architecture, or an argument that ``model.arch`` may not set.
    """
    if path is None:
        return Stated()
    record = read_record(path, dict[str, Any], "get the weights again")
    if is_transformers_config(record):
        arch, side = read_architecture(path, source)
        return Stated(**{"arch": arch, "input_size": side, **read_input(find(PREPROCESSOR))})
    if "architecture" not in record:
        return Stated()
    config = read_record(path, _Config, "get the weights again")
    own = config.pretrained_cfg or config  # timm before 0.9 has no inner part
    size = config.model_args.get("img_size")
    size = size[0] if isinstance(size, list) and size else size
    return Stated(
        arch=_arch(config, source),
        mean=own.mean,
        std=own.std,
        input_size=size if isinstance(size, int) else (own.input_size[1] if own.input_size else None),
        mpp=own.mpp or config.mpp,
        licence=own.license,
    )


def _arch(config: _Config, source: str) -> str:
    assert config.architecture is not None
    arguments = {
        name: value
        for name, value in config.model_args.items()
        if name not in _NOT_STRUCTURE and value is not None and value != ""
    }
    unknown = [name for name, value in arguments.items() if name not in ARGUMENTS or not _is_plain(value)]
    if unknown:
        raise InputError(
            f"{source}: its {CONFIG} builds {config.architecture} with {unknown[0]}={arguments[unknown[0]]!r:.100}, "
            f"which model.arch cannot set ({', '.join(ARGUMENTS)}); write a builder of your own (docs/architecture.md)"
        )
    arch = join_arch(config.architecture, arguments)
    timm_name(arch)
    return arch


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str))
