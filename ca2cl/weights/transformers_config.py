"""``config.json`` of a transformers ViT: the same architecture in timm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Gt, Len

from ca2cl.common.records import Number, read_record
from ca2cl.errors import InputError
from ca2cl.models.timm.spelling import join_arch, timm_name

PREPROCESSOR = "preprocessor_config.json"
"""File beside ``config.json`` with mean, standard deviation and size of the input."""
_AGAIN = "get the weights again"
_VIT_BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12}
_SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6, "patch_size": 16}


@dataclass(frozen=True, kw_only=True)
class _Config:
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int
    image_size: int = 224
    num_channels: int = 3
    intermediate_size: int | None = None
    mlp_ratio: float = 4
    hidden_act: str = "gelu"
    layer_norm_eps: float | None = None
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False
    num_register_tokens: int | None = None
    query_bias: bool = True
    value_bias: bool = True
    key_bias: bool = False
    proj_bias: bool = True
    mlp_bias: bool = True
    use_gated_mlp: bool = False
    rope_theta: float = 100.0


@dataclass(frozen=True, kw_only=True)
class _Preprocessor:
    image_mean: Annotated[tuple[Number, ...], Len(3, 3)] | None = None
    image_std: Annotated[tuple[Annotated[Number, Gt(0)], ...], Len(3, 3)] | None = None
    crop_size: Any = None
    size: Any = None
    do_center_crop: bool = False


def is_transformers_config(record: Mapping[str, Any]) -> bool:
    """True if a ``config.json`` is one of a model that can be read."""
    return record.get("model_type") in _ARCHITECTURES


def read_architecture(path: Path, source: str) -> tuple[str, int]:
    """timm's name of the model as ``model.arch``, and the side of its input in pixels.

    Raises:
        InputError: damaged, or a variant that timm does not have.
    """
    config = read_record(path, _Config, _AGAIN)
    if config.num_channels != 3:
        raise _unknown(source, "num_channels", config.num_channels)
    arch = _ARCHITECTURES[config.model_type](config, source)
    timm_name(arch)
    return arch, config.image_size


def read_input(path: Path | None) -> dict[str, Any]:
    """Mean, standard deviation and input size of a ``preprocessor_config.json``, as far as it states them.

    Raises:
        InputError: damaged.
    """
    if path is None:
        return {}
    found = read_record(path, _Preprocessor, _AGAIN)
    side = _side(found.crop_size) if found.do_center_crop else None
    stated = {"mean": found.image_mean, "std": found.image_std, "input_size": side or _side(found.size)}
    return {name: value for name, value in stated.items() if value is not None}


def _side(size: Any) -> int | None:
    """transformers has a number, or a dictionary of height and width or of the shortest edge."""
    values = list(size.values()) if isinstance(size, Mapping) else [size]
    return values[0] if values and isinstance(values[0], int) and len(set(values)) == 1 else None


def _vit(config: _Config, source: str) -> str:
    _check_numerics(config, source, 1e-6)
    arguments = {**_shape(config), "patch_size": config.patch_size, "qkv_bias": config.qkv_bias}
    arguments |= _mlp(config, config.intermediate_size)
    return _named("vit_base_patch16_224", arguments, {**_VIT_BASE, "patch_size": 16, "qkv_bias": True})


def _dinov2(config: _Config, source: str) -> str:
    _check_numerics(config, source, 1e-6)
    arguments: dict[str, Any] = {**_shape(config), "patch_size": config.patch_size, "qkv_bias": config.qkv_bias}
    inner = int(config.hidden_size * config.mlp_ratio)
    if config.use_swiglu_ffn:
        # two matrices in one; transformers makes them two thirds as wide, in multiples of 8
        arguments |= {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}
        inner = 2 * ((int(inner * 2 / 3) + 7) // 8 * 8)
    arguments |= _mlp(config, inner)
    if config.model_type == "dinov2_with_registers":
        registers = 4 if config.num_register_tokens is None else config.num_register_tokens
        arguments |= {"reg_tokens": registers, "no_embed_class": True}
    return _named("vit_base_patch14_dinov2", arguments, {**_VIT_BASE, "patch_size": 14, "qkv_bias": True})


def _dinov3(config: _Config, source: str) -> str:
    for name, only in (("num_register_tokens", 4), ("key_bias", False), ("proj_bias", True), ("mlp_bias", True),
                       ("rope_theta", 100.0), ("value_bias", config.query_bias)):  # fmt: skip
        if getattr(config, name) != only:
            raise _unknown(source, name, getattr(config, name))
    _check_numerics(config, source, 1e-5)
    inner = config.intermediate_size or 4 * config.hidden_size
    plus, bias = "_plus" if config.use_gated_mlp else "", "_qkvb" if config.query_bias else ""
    arguments = {**_shape(config), "patch_size": config.patch_size, "global_pool": "token"}
    # timm's plus models have a wider MLP than four times by themselves
    arguments |= {"mlp_ratio": _ratio(inner, config.hidden_size)} if plus else _mlp(config, inner)
    return _named(f"vit_small{plus}_patch16_dinov3{bias}", arguments, _SMALL)


_ARCHITECTURES: dict[str, Callable[[_Config, str], str]] = {
    "vit": _vit,
    "dinov2": _dinov2,
    "dinov2_with_registers": _dinov2,
    "dinov3_vit": _dinov3,
}
"""By ``model_type``."""


def _shape(config: _Config) -> dict[str, Any]:
    return {
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
    }


def _mlp(config: _Config, inner: int | None) -> dict[str, Any]:
    if inner is None or inner == 4 * config.hidden_size:
        return {}
    return {"mlp_ratio": _ratio(inner, config.hidden_size)}


def _ratio(inner: int, dim: int) -> float:
    """A number that timm, which cuts off decimals, multiplies by ``dim`` to ``inner``."""
    return inner / dim if inner % dim == 0 else round((inner + 0.5) / dim, 6)


def _named(name: str, arguments: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
    return join_arch(name, {key: value for key, value in arguments.items() if usual.get(key) != value})


def _check_numerics(config: _Config, source: str, eps: float) -> None:
    """timm's models have an exact GELU (SiLU where DINOv3's MLP is gated) and one epsilon; ViT's of 1e-12 is 1e-6 to
    within rounding."""
    if config.hidden_act != ("silu" if config.use_gated_mlp else "gelu"):
        raise _unknown(source, "hidden_act", config.hidden_act)
    given = eps if config.layer_norm_eps is None else config.layer_norm_eps
    if given > eps * 1.001 or (eps > 1e-6 and given < eps * 0.999):
        raise _unknown(source, "layer_norm_eps", config.layer_norm_eps)


def _unknown(source: str, name: str, value: Any) -> InputError:
    return InputError(
        f"{source}: its config.json has {name}={value!r:.100}, which timm's model of that kind does not have; write a "
        "builder of your own (docs/architecture.md)"
    )
