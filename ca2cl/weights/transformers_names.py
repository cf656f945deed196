"""Tensors of transformers' ViTs under timm's names.

The models are ``ViTModel``, ``Dinov2Model``, ``Dinov2WithRegistersModel`` and ``DINOv3ViTModel`` of transformers, under
the names that their published files have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

MARK = "embeddings.cls_token"
"""A tensor that all of them have, and no other layout."""
_BLOCK = re.compile(r"(?:model\.)?(?:encoder\.)?layers?\.(\d+)\.(.+)")
_PARTS = ("query", "key", "value"), ("q_proj", "k_proj", "v_proj")
_IN_BLOCK = {
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.weights_in": "mlp.fc1",
    "mlp.weights_out": "mlp.fc2",
    "mlp.gate_proj": "mlp.fc1_g",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
}
"""Beginnings of names in a block; ``norm1``, ``norm2``, ``mlp.fc1`` and ``mlp.fc2`` are timm's already."""
_OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.register_tokens": "reg_token",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "embeddings.patch_embeddings.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_LEFT_OUT = re.compile(r"embeddings\.mask_token$|pooler\.|classifier\.|rope_embeddings\.inv_freq$")
"""What only pre-training or a head needs, or is computed."""


def is_transformers(state: Mapping[str, Tensor]) -> bool:
    """True if these are the tensors of one of the models."""
    return MARK in state


def timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` under timm's names, query, key and value in one; a name that is not known stays as it is.

    Args:
        state: tensors of one of the models, without a prefix.
    """
    is_eva = "embeddings.patch_embeddings.weight" in state  # DINOv3, which timm has as an EVA
    gated = any(name.endswith("mlp.gate_proj.weight") for name in state)
    named: dict[str, Tensor] = {}
    fused: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        block = _BLOCK.fullmatch(name)
        if block is None:
            if not _LEFT_OUT.match(name):
                named[_OUTSIDE.get(name, name)] = tensor
            continue
        part, _, kind = block[2].rpartition(".")
        word = part.rpartition(".")[2]
        if any(word in parts for parts in _PARTS):
            fused.setdefault(f"blocks.{block[1]}.attn.{kind}", {})[word[0]] = tensor
        else:
            named[f"blocks.{block[1]}.{_in_block(part, kind, is_eva, gated)}"] = tensor
    for name, parts in fused.items():
        named |= _attention(name, parts, is_eva)
    return _with_position(named)


def _in_block(part: str, kind: str, is_eva: bool, gated: bool) -> str:
    if part in ("layer_scale1", "layer_scale2"):
        return f"gamma_{part[-1]}" if is_eva else f"ls{part[-1]}.gamma"
    own = _IN_BLOCK.get(part, part)
    return f"{own}_x.{kind}" if gated and part == "mlp.up_proj" else f"{own}.{kind}"


def _attention(name: str, parts: Mapping[str, Tensor], is_eva: bool) -> dict[str, Tensor]:
    """Query, key and value of one block, by the first letter; DINOv3 has no bias of the key."""
    before, _, kind = name.rpartition(".")
    if kind == "bias" and is_eva:
        kept = {letter: one for letter, one in parts.items() if letter != "k" or one.any()}
        return {f"{before}.{letter}_bias": one for letter, one in kept.items()}
    if len(parts) < 3:  # named as missing
        return {f"{before}.{letter}.{kind}": one for letter, one in parts.items()}
    return {f"{before}.qkv.{kind}": torch.cat([parts[letter] for letter in "qkv"])}


def _with_position(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """With registers timm's position embeddings are of patches alone: the class token's own is added to the token."""
    if {"reg_token", "pos_embed", "cls_token"} <= named.keys():
        positions = named["pos_embed"]
        return {**named, "cls_token": named["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}
    return named
