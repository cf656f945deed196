"""Checkpoint files of other programs: each layout gives the encoder, tensor by tensor, and nothing is lost silently."""

from __future__ import annotations

import argparse
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from ca2cl.errors import InputError
from ca2cl.models.backbone import build_encoder
from ca2cl.registry.resolve import ResolvedEncoder, resolve_encoder
from ca2cl.weights.layouts import left_out

State = dict[str, Tensor]
VIT, REGISTERS = "timm:test_vit", "timm:test_vit,init_values=1e-05,no_embed_class=true,reg_tokens=2"
SIDE = 64


def vit(arch: str = VIT, seed: int = 0) -> State:
    torch.manual_seed(seed)
    state = build_encoder(arch, image_size=SIDE).state_dict()
    return {name: torch.randn_like(one) * 0.1 for name, one in state.items()}


def under(prefix: str, state: State) -> State:
    return {prefix + name: one for name, one in state.items()}


def heads(prefix: str) -> State:
    return under(prefix, {"mlp.0.weight": torch.randn(4, 4), "last_layer.weight_g": torch.ones(4, 1)})


def resolved(tmp_path: Path, content: Any, arch: str = VIT, name: str = "file.pth") -> ResolvedEncoder:
    if name.endswith(".safetensors"):
        save_file(content, tmp_path / name)
    else:
        torch.save(content, tmp_path / name)
    return resolve_encoder(str(tmp_path / name), arch=arch)


def check(found: ResolvedEncoder, expected: State) -> None:
    state = found.encoder.state_dict()
    assert state.keys() == expected.keys()
    for name, one in expected.items():
        assert torch.equal(state[name], one), name
    assert found.start is not None and found.start.tensors == len(expected)


FILES: dict[str, tuple[str, Callable[[State, State], Any]]] = {
    "DINO, teacher": (
        "teacher (in 'teacher', under backbone.*)",
        lambda a, b: {
            "student": under("module.backbone.", b) | heads("module.head."),
            "teacher": under("backbone.", a) | heads("head."),
            "optimizer": {"state": {}, "param_groups": []},
            "epoch": 3,
            "args": argparse.Namespace(arch="vit_small", patch_size=16),
        },
    ),
    "DINO with BatchNorm, both wrapped": (
        "teacher (in 'teacher', under backbone.*)",
        lambda a, b: {"student": under("module.backbone.", b), "teacher": under("module.backbone.", a)},
    ),
    "DINO, student alone": (
        "student (in 'student', under backbone.*)",
        lambda a, b: {"student": under("module.backbone.", a) | heads("module.head.")},
    ),
    "DINOv2, evaluated teacher": (
        "teacher (in 'teacher', under backbone.*)",
        lambda a, b: {
            "teacher": under("backbone.", a)
            | {"backbone.mask_token": torch.zeros(1, 64)}
            | heads("dino_head.")
            | heads("ibot_head.")
        },
    ),
    "DINOv2, training checkpoint": (
        "teacher (in 'model', under teacher.backbone.*)",
        lambda a, b: {
            "model": under("student.backbone.", b) | under("teacher.backbone.", a) | heads("teacher.dino_head.")
        },
    ),
    "DINOv2, Meta's file": (
        "a plain encoder",
        lambda a, b: a | {"mask_token": torch.zeros(1, 64)},
    ),
    "DINOv2 in chunks": (
        "teacher (in 'teacher', under backbone.*)",
        lambda a, b: {"teacher": under("backbone.", chunked(a)) | {"backbone.mask_token": torch.zeros(1, 64)}},
    ),
    "MoCo v3": (
        "MoCo v3's query encoder (in 'state_dict', under base_encoder.*)",
        lambda a, b: {
            "state_dict": under("module.base_encoder.", a)
            | under("module.momentum_encoder.", b)
            | under("module.base_encoder.head.", {"0.weight": torch.ones(3, 3)})
            | under("module.predictor.", {"0.weight": torch.ones(3, 3)})
        },
    ),
    "MoCo v3's momentum encoder alone": (
        "MoCo v3's momentum encoder",
        lambda a, b: {"state_dict": under("module.momentum_encoder.", a)},
    ),
    "timm's checkpoint with an average": (
        "timm's averaged model (in 'state_dict_ema')",
        lambda a, b: {"state_dict": b, "state_dict_ema": a, "epoch": 1, "args": argparse.Namespace(model="x")},
    ),
    "timm's, compiled and distributed": (
        "a plain encoder",
        lambda a, b: {"state_dict": under("module._orig_mod.", a | {"head.weight": torch.ones(10, 64)})},
    ),
    "lightly's DINO": (
        "lightly's teacher (in 'state_dict', under teacher_backbone.*)",
        lambda a, b: {
            "state_dict": under("student_backbone.", b) | under("teacher_backbone.", a) | heads("student_head.")
        },
    ),
    "lightly's masked ViT": (
        "lightly's teacher (in 'state_dict', under teacher_backbone.vit.*)",
        lambda a, b: {
            "state_dict": under("teacher_backbone.vit.", a)
            | under("student_backbone.vit.", b)
            | {"teacher_backbone.mask_token": torch.zeros(1, 1, 64)}
        },
    ),
    "LightlyTrain's": (
        "LightlyTrain's teacher",
        lambda a, b: {
            "state_dict": under("teacher_embedding_model.wrapped_model._model.", a)
            | under("student_embedding_model.wrapped_model._model.", b)
        },
    ),
    "SimCLR's of lightly": (
        "an encoder beside its heads",
        lambda a, b: {"state_dict": under("backbone.", a) | heads("projection_head.")},
    ),
    "under model.": ("a plain encoder (under model.*)", lambda a, b: under("model.", a)),
}


def chunked(state: State) -> State:
    """Two chunks, in which a block keeps its number: ``blocks.CHUNK.BLOCK``."""
    return {
        re.sub(r"^blocks\.(\d+)\.", lambda m: f"blocks.{int(m[1]) // 3}.{m[1]}.", name): one
        for name, one in state.items()
    }


@pytest.mark.parametrize("name", FILES)
def test_each_layout_gives_the_encoder(name: str, tmp_path: Path) -> None:
    words, make = FILES[name]
    wanted, other = vit(seed=1), vit(seed=2)
    found = resolved(tmp_path, make(wanted, other))
    check(found, wanted)
    assert found.start is not None and words in found.start.layout
    assert found.card.start_layout == found.start.layout and found.card.input_size == SIDE  # of its embeddings


def test_blocks_of_an_efficientnets_stages_are_no_chunks(tmp_path: Path) -> None:
    """Its names are ``blocks.STAGE.BLOCK``, too, but a block's number says nothing without the stage's."""
    arch = "timm:test_efficientnet"
    wanted = {name: x.detach().clone() for name, x in build_encoder(arch, image_size=SIDE).state_dict().items()}
    found = resolved(tmp_path, wanted, arch).encoder.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("module.encoder_q.", "MoCo v2's query encoder (in 'state_dict', under encoder_q.*)"),
        ("module.encoder_k.", "MoCo v2's key encoder"),
        ("backbone_momentum.", "lightly's momentum encoder"),
        ("student_backbone.", "lightly's student"),
        ("student_embedding_model.wrapped_model._model.", "LightlyTrain's student"),
        ("model_ema.backbone.", "DINOv3's averaged model"),
        ("encoder.", "an encoder beside its heads (in 'state_dict', under encoder.*)"),
    ],
)
def test_a_single_encoder_is_found_under_its_prefix(prefix: str, words: str, tmp_path: Path) -> None:
    wanted = vit(seed=3)
    found = resolved(tmp_path, {"state_dict": under(prefix, wanted), "queue": torch.zeros(3)})
    check(found, wanted)
    assert found.start is not None and words in found.start.layout


def test_moco_and_lightly_resnets_come_under_torchvisions_names(tmp_path: Path) -> None:
    torch.manual_seed(4)
    resnet = torchvision.models.resnet18(num_classes=128)
    wanted = {name: one for name, one in resnet.state_dict().items() if not name.startswith("fc.")}
    moco = {"state_dict": under("module.encoder_q.", dict(resnet.state_dict())) | {"module.queue": torch.ones(2)}}
    check(resolved(tmp_path, moco, "resnet18"), wanted)
    numbered = nn.Sequential(*list(resnet.children())[:-1]).state_dict()  # as in lightly's examples
    check(resolved(tmp_path, {"state_dict": under("backbone.", dict(numbered))}, "resnet18", "b.ckpt"), wanted)
    check(resolved(tmp_path, under("module.", dict(resnet.state_dict())), "timm:resnet18", "c.bin"), wanted)


def test_registers_of_dinov2_take_their_places(tmp_path: Path) -> None:
    """The file's class token has a position, timm's has not: it is added."""
    wanted = vit(REGISTERS, seed=5)
    meta = dict(wanted)
    at_class = torch.randn(1, 1, 64)
    meta["register_tokens"] = meta.pop("reg_token")
    meta["cls_token"] = wanted["cls_token"] - at_class
    meta["pos_embed"] = torch.cat([at_class, wanted["pos_embed"]], 1)
    for name, content in {
        "whole.pth": OrderedDict(meta, mask_token=torch.zeros(1, 64)),
        "bare.safetensors": meta,
        "teacher.pth": {"teacher": under("backbone.", chunked(meta)) | {"backbone.mask_token": torch.zeros(1, 64)}},
    }.items():
        found = resolved(tmp_path, content, REGISTERS, name)
        state = found.encoder.state_dict()
        torch.testing.assert_close(state.pop("cls_token"), wanted["cls_token"], rtol=0, atol=1e-6)
        assert all(torch.equal(state[key], wanted[key]) for key in state), name
        assert found.card.input_size == SIDE


DINOV3 = "timm:vit_small_patch16_dinov3,depth=2,embed_dim=64,num_heads=2"


def dinov3(state: State) -> State:
    """Meta's names of timm's tensors, with what Meta's files have beside them."""
    renames = {r"gamma_([12])$": r"ls\1.gamma", r"^reg_token$": "storage_tokens"}
    meta = {}
    for name, one in state.items():
        for old, new in renames.items():
            name = re.sub(old, new, name)
        meta[name] = one
    for block in range(2):
        meta[f"blocks.{block}.attn.qkv.bias"] = torch.zeros(192)
        meta[f"blocks.{block}.attn.qkv.bias_mask"] = torch.ones(192)
    return meta | {"mask_token": torch.zeros(1, 64), "rope_embed.periods": torch.ones(8)}


def test_dinov3_comes_under_timms_names_and_its_biases_must_be_zero(tmp_path: Path) -> None:
    torch.manual_seed(6)
    shapes = build_encoder(DINOV3, image_size=SIDE).state_dict()
    wanted = {name: torch.randn_like(one) for name, one in shapes.items()}
    check(resolved(tmp_path, {"teacher": under("backbone.", dinov3(wanted))}, DINOV3), wanted)
    check(resolved(tmp_path, dinov3(wanted), DINOV3), wanted)
    biased = dinov3(wanted)
    biased["blocks.1.attn.qkv.bias"] = torch.ones(192)
    with pytest.raises(InputError, match=r"1 unexpected \(first blocks.1.attn.qkv.bias\)"):
        resolved(tmp_path, biased, DINOV3)


@pytest.mark.parametrize(
    ("name", "out"),
    [
        ("layers.0.blocks.0.attn.relative_position_index", True),  # of Swin's authors
        ("layers.0.blocks.1.attn_mask", True),
        ("vit.mask_token", True),
        ("rope_embed.periods", True),
        ("blocks.0.attn.relative_position_bias_table", False),
        ("blocks.0.attn.qkv.bias", False),
        ("norm.weight", False),
    ],
)
def test_only_constants_and_what_pre_training_needs_are_left_out(name: str, out: bool) -> None:
    assert left_out(name, torch.ones(3)) is out


def test_what_is_left_over_on_either_side_is_named(tmp_path: Path) -> None:
    state = vit()
    missing = [name for name in state if name.startswith("blocks.1.")]
    for name in missing:
        del state[name]
    state |= {f"extra.{n}": torch.ones(2) for n in range(7)}
    with pytest.raises(InputError) as error:
        resolved(tmp_path, {"teacher": under("backbone.", state)})
    told = str(error.value)
    assert f"{len(missing)} missing (first {', '.join(missing[:5])})" in told and "\n" not in told
    assert "7 unexpected (first extra.0, extra.1, extra.2, extra.3, extra.4)" in told


def test_other_patches_and_other_files_are_refused(tmp_path: Path) -> None:
    state = vit()
    state["patch_embed.proj.weight"] = torch.ones(64, 3, 14, 14)
    with pytest.raises(InputError, match=r"1 of another shape \(first patch_embed.proj.weight\)"):
        resolved(tmp_path, state)
    with pytest.raises(InputError, match="not a timm:test_vit: 0 of"):
        resolved(tmp_path, build_encoder("timm:test_resnet").state_dict())
    with pytest.raises(InputError, match="no named tensors in it .but epoch, opt"):
        resolved(tmp_path, {"epoch": 3, "opt": {"lr": 1.0}})
    with pytest.raises(InputError, match="holds a list, not named tensors"):
        resolved(tmp_path, [torch.ones(2)])
