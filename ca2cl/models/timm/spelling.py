"""Names of timm's models, with arguments: ``timm:NAME,ARGUMENT=VALUE``.

Public weights are often of a model that timm builds only with arguments (a layer scale, registers, a gated MLP). They
are part of the name, so that a card is enough to build the model again.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from ca2cl.common.arch_names import TIMM, canonical_arch
from ca2cl.errors import InputError, nearest

ARGUMENTS = (
    "act_layer", "class_token", "depth", "embed_dim", "fc_norm", "final_norm", "global_pool", "init_values",
    "ls_init_value", "mlp_layer", "mlp_ratio", "no_embed_class", "norm_layer", "num_heads", "patch_size", "pre_norm",
    "proj_bias", "qk_norm", "qkv_bias", "reg_tokens", "window_size",
)  # fmt: skip
"""Arguments of timm's models that a name may set: they say which tensors there are, and load nothing."""
MLP_LAYERS = ("GluMlp", "Mlp", "SwiGLU", "SwiGLUPacked")
"""Classes of ``timm.layers`` that ``mlp_layer`` may name."""


def split_arch(arch: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments of ``timm:NAME,ARGUMENT=VALUE,...``; values are numbers, True or False, or words.

    Raises:
        InputError: an argument that a name may not set.
    """
    name, *words = canonical_arch(arch).removeprefix(TIMM).split(",")
    arguments = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in ARGUMENTS:
            raise InputError(f"model.arch is {arch!r}: {key} is not among the arguments; {nearest(key, ARGUMENTS)}")
        arguments[key] = _value(value)
    return name, arguments


def join_arch(name: str, arguments: Mapping[str, Any]) -> str:
    """The architecture's name that ``split_arch`` takes apart."""
    return TIMM + ",".join([name, *(f"{key}={_word(arguments[key])}" for key in sorted(arguments))])


def _value(word: str) -> Any:
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def timm_name(arch: str) -> str:
    """timm's own name of the model.

    Raises:
        InputError: timm has no such model, with the nearest name.
    """
    import timm

    name, _ = split_arch(arch)
    # the list, and not create_model: that would follow names of repositories on the hub
    known = timm.list_models()
    if name in known:
        return name
    model, _, tag = name.partition(".")
    if model in known:
        raise InputError(
            f"model.arch is {arch!r}: .{tag} names weights; use --model.arch {TIMM}{model} --model.weights {TIMM}{name}"
        )
    close = difflib.get_close_matches(name, known, n=1)
    raise InputError(
        f"model.arch is {arch!r}: timm has no {name}; "
        + (f"did you mean {TIMM}{close[0]}?" if close else "see timm.list_models()")
    )


def settings_of(arch: str) -> Any:
    """timm's configuration of the model: its stem, its classifiers, and the input of its default weights."""
    import timm

    return timm.get_pretrained_cfg(timm_name(arch))


def create_arguments(arch: str, image_size: int) -> dict[str, Any]:
    """Arguments of ``timm.create_model`` for this architecture and tiles of that size, as plain values."""
    fixed = settings_of(arch).fixed_input_size
    return {**split_arch(arch)[1], **({"img_size": image_size} if fixed else {})}


def built(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """``arguments`` with the class of ``timm.layers`` in place of an MLP's name.

    Raises:
        InputError: no such MLP.
    """
    if "mlp_layer" not in arguments:
        return dict(arguments)
    import timm.layers

    layer = str(arguments["mlp_layer"])
    if layer not in MLP_LAYERS:
        raise InputError(f"model.arch has mlp_layer={layer}: {nearest(layer, MLP_LAYERS)}")
    return {**arguments, "mlp_layer": getattr(timm.layers, layer)}
