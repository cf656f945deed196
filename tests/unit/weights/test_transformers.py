"""Repositories of transformers' format: architecture, names and input, against timm's model and transformers' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ca2cl.errors import InputError
from ca2cl.models.backbone import build_encoder
from ca2cl.registry.resolve import resolve_encoder

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "vit": {"model_type": "vit", "intermediate_size": 96, "layer_norm_eps": 1e-6, "qkv_bias": False},
    "dinov2": {"model_type": "dinov2", "mlp_ratio": 3, "layer_norm_eps": 1e-6},
    "swiglu": {"model_type": "dinov2", "use_swiglu_ffn": True, "mlp_ratio": 4},
    "registers": {"model_type": "dinov2_with_registers", "num_register_tokens": 3},
    "dinov3": {"model_type": "dinov3_vit", "intermediate_size": 128, "num_register_tokens": 4, "layer_norm_eps": 1e-5},
    "gated": {
        "model_type": "dinov3_vit", "intermediate_size": 96, "num_register_tokens": 4, "use_gated_mlp": True,
        "hidden_act": "silu",
    },
}  # fmt: skip


def published(state: dict[str, torch.Tensor], eva: bool) -> dict[str, torch.Tensor]:
    """A timm ViT's tensors as transformers publishes a DINOv2 with registers, or a DINOv3; by hand."""
    found = {}
    for name, tensor in state.items():
        words = name.split(".")
        outside = {"cls_token": "cls_token", "reg_token": "register_tokens", "pos_embed": "position_embeddings"}
        if name in outside:
            found[f"embeddings.{outside[name]}"] = tensor
        elif words[0] == "patch_embed":
            found[f"embeddings.patch_embeddings.{'' if eva else 'projection.'}{words[-1]}"] = tensor
        elif words[0] == "norm":
            found[f"{'norm' if eva else 'layernorm'}.{words[1]}"] = tensor
        else:
            before = f"layer.{words[1]}." if eva else f"encoder.layer.{words[1]}."
            rest = ".".join(words[2:])
            if "qkv" in rest:
                names = ("q_proj", "k_proj", "v_proj") if eva else ("query", "key", "value")
                inner = "attention." if eva else "attention.attention."
                for one, part in zip(names, tensor.chunk(3), strict=True):
                    found[f"{before}{inner}{one}.{words[-1]}"] = part.clone()
            elif rest in ("attn.q_bias", "attn.v_bias"):
                found[f"{before}attention.{rest[5]}_proj.bias"] = tensor
            else:
                for ours, theirs in (
                    ("attn.proj", "attention.o_proj" if eva else "attention.output.dense"),
                    ("gamma_1", "layer_scale1.lambda1"), ("gamma_2", "layer_scale2.lambda1"),
                    ("ls1.gamma", "layer_scale1.lambda1"), ("ls2.gamma", "layer_scale2.lambda1"),
                    *([("mlp.fc1", "mlp.up_proj"), ("mlp.fc2", "mlp.down_proj")] if eva else []),
                ):  # fmt: skip
                    rest = rest.replace(ours, theirs)
                found[before + rest] = tensor
    if not eva:  # position of the class token, which timm adds to the token
        first = torch.randn_like(found["embeddings.cls_token"])
        found["embeddings.cls_token"] = found["embeddings.cls_token"] - first
        found["embeddings.position_embeddings"] = torch.cat([first, found["embeddings.position_embeddings"]], 1)
    return {**found, "embeddings.mask_token": torch.zeros(1, 32)}


def written(folder: Path, config: dict[str, Any], state: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["X"], **SHAPE, **config}))
    save_file(state, folder / "model.safetensors")
    return folder


def trained(arch: str) -> torch.nn.Module:
    torch.manual_seed(0)
    encoder = build_encoder(arch, image_size=64).eval()
    with torch.no_grad():
        for one in encoder.parameters():
            one.add_(0.1 * torch.randn_like(one))
    return encoder


@pytest.mark.parametrize(
    ("kind", "arch"),
    [
        ("registers", "timm:vit_base_patch14_dinov2,depth=2,embed_dim=32,no_embed_class=true,num_heads=2,patch_size=16,"
                      "reg_tokens=3"),
        ("dinov3", "timm:vit_small_patch16_dinov3_qkvb,depth=2,embed_dim=32,global_pool=token,num_heads=2"),
    ],
)  # fmt: skip
def test_a_repository_becomes_timms_model(kind: str, arch: str, tmp_path: Path) -> None:
    own = trained(arch)
    state = published(own.state_dict(), kind == "dinov3")
    folder = written(tmp_path / kind, CONFIGS[kind], state)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.7, 0.5, 0.7], "image_std": [0.2, 0.3, 0.2], "size": {"shortest_edge": 72},
                    "crop_size": {"height": 48, "width": 48}, "do_center_crop": True})
    )  # fmt: skip
    found = resolve_encoder(str(folder))
    assert (found.card.arch, found.card.input_size) == (arch, 48)
    assert (found.card.mean, found.card.std) == ((0.7, 0.5, 0.7), (0.2, 0.3, 0.2))
    assert found.start is not None and found.start.layout == "transformers'"
    (folder / "preprocessor_config.json").unlink()
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(resolve_encoder(str(folder)).encoder(x), own(x), rtol=1e-5, atol=1e-5)
    # a file with a head's prefix, and no configuration
    alone = {f"{CONFIGS[kind]['model_type']}.{name}": one for name, one in state.items()}
    save_file({**alone, "classifier.weight": torch.zeros(2, 32)}, tmp_path / "alone.safetensors")
    with torch.inference_mode():
        read = resolve_encoder(str(tmp_path / "alone.safetensors"), arch=arch)
    assert read.start is not None and read.start.layout.startswith("transformers' (under ")


def test_every_tensor_must_find_its_place(tmp_path: Path) -> None:
    arch = (
        "timm:vit_base_patch14_dinov2,depth=2,embed_dim=32,no_embed_class=true,num_heads=2,patch_size=16,reg_tokens=3"
    )
    state = published(trained(arch).state_dict(), eva=False)
    for number, (change, words) in enumerate(
        [
            ({"encoder.layer.1.adapter.weight": torch.ones(2)}, "1 unexpected (first blocks.1.adapter.weight)"),
            ({"encoder.layer.0.attention.attention.key.weight": None}, "1 missing (first blocks.0.attn.qkv.weight)"),
            ({"embeddings.register_tokens": torch.zeros(1, 4, 32)}, "1 of another shape (first reg_token)"),
        ]
    ):
        changed = {name: one for name, one in {**state, **change}.items() if one is not None}
        with pytest.raises(InputError) as error:
            resolve_encoder(str(written(tmp_path / str(number), CONFIGS["registers"], changed)))
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "dinov2", "hidden_act": "quick_gelu"}, "hidden_act='quick_gelu'"),
        ({"model_type": "vit", "layer_norm_eps": 1e-3}, "layer_norm_eps=0.001"),
        ({"model_type": "dinov3_vit", "num_register_tokens": 0}, "num_register_tokens=0"),
        ({"model_type": "vit", "num_channels": 4}, "num_channels=4"),
        ({"model_type": "vit", "hidden_size": "wide"}, "config.json: damaged"),
    ],
)
def test_what_timm_does_not_have_is_refused_by_name(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="config.json") as error:
        resolve_encoder(str(written(tmp_path / "x", config, {"embeddings.cls_token": torch.zeros(1, 1, 32)})))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", CONFIGS)
def test_features_are_transformers_own(kind: str, tmp_path: Path) -> None:
    """At the size of the position embeddings; transformers is no dependency."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    given = {**SHAPE, **CONFIGS[kind]}
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**given)).eval()
    with torch.no_grad():
        for one in model.parameters():
            one.add_(0.1 * torch.randn_like(one))
    model.save_pretrained(tmp_path / "model")
    names = load_file(tmp_path / "model" / "model.safetensors")
    found = resolve_encoder(str(tmp_path / "model"))
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        theirs, ours = model(x).last_hidden_state, found.encoder.tokens(x)
        torch.testing.assert_close(found.encoder(x), theirs[:, 0], rtol=1e-5, atol=1e-5)
    prefix = ours.prefix.shape[1]
    torch.testing.assert_close(ours.patches.flatten(1, 2), theirs[:, prefix:], rtol=1e-5, atol=1e-5)
    assert found.start is not None and found.start.tensors == len(found.encoder.state_dict())
    assert any("query" in name or "q_proj" in name for name in names)
