"""timm's bodies by name: spelling, arguments, sizes, pooling and tokens, each against timm's own model."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import yaml
from torch import nn

from ca2cl.cli.parser import parse
from ca2cl.common.plugins import is_plugin, names_code
from ca2cl.config import ModelConfig, Pooling
from ca2cl.errors import InputError
from ca2cl.export.run import TARGETS, export
from ca2cl.models.backbone import Backbone, build_encoder, is_arch
from ca2cl.models.encoder_io import EncoderCard, load_encoder, save_encoder
from ca2cl.models.timm.spelling import join_arch, split_arch
from ca2cl.registry.resolve import ResolvedEncoder

# others are in tests/jobs/registry/test_public_bodies.py
LARGE = {
    "deit_small_distilled_patch16_224": (224, 160),
    "tf_efficientnet_lite0": (224, 161),
    "resnet10t": (64, 96),
    "xcit_nano_12_p16_224": (224, 160),
}
SMALL = {
    "test_vit": (160, 96),
    "test_vit2": (64, 96),
    "test_vit3": (160, 64),
    "test_convnext": (160, 96),
    "test_efficientnet": (160, 97),
}


def own(name: str, side: int, state: dict[str, torch.Tensor] | None = None) -> nn.Module:
    """timm's model for tiles of that size, with timm's own loading of ``state``."""
    size = {"img_size": side} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    given = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": state, "num_classes": 0}} if state else {}
    model: nn.Module = timm.create_model(name, num_classes=0, **size, **given)
    return model.eval()


def check_features(name: str, sides: tuple[int, int]) -> None:
    """At the first size, and from its weights at the second."""
    torch.manual_seed(0)
    trained = own(name, sides[0])
    state = trained.state_dict()
    for side in sides:
        reference = own(name, side, dict(state))
        encoder = build_encoder(f"timm:{name}", image_size=side).eval()
        encoder.load_state_dict(encoder.fitted(state), strict=True)
        x = torch.randn(2, 3, side, side)
        with torch.no_grad():
            expected, found = reference(x), encoder(x)
        assert found.shape == (2, encoder.feature_dim)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", SMALL)
def test_features_are_timms_at_two_sizes(name: str) -> None:
    check_features(name, SMALL[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_features_of_a_public_body_are_timms_at_two_sizes(name: str) -> None:
    check_features(name, LARGE[name])


@pytest.mark.parametrize("arch", ["timm:tf_efficientnet_lite0", "timm:resnet10t"])
def test_the_first_convolution_is_perturbed_whatever_the_stem(arch: str) -> None:
    encoder = build_encoder(arch, image_size=33).eval()  # an odd side: padded on one side more by the first
    x, delta = torch.randn(2, 3, 33, 33), torch.randn_like(encoder.stem.weight)
    assert encoder.stem.weight.shape[1] == 3
    with torch.no_grad():
        perturbed = encoder(x, delta)
        encoder.stem.weight += delta
        torch.testing.assert_close(perturbed, encoder(x))


def test_the_gradient_of_a_stem_padded_as_same_is_autograds(arch: str = "timm:tf_efficientnet_lite0") -> None:
    encoder = build_encoder(arch, "frozen", image_size=33).eval().double()
    x = torch.randn(3, 3, 33, 33, dtype=torch.float64)
    found = []
    for reproducible in (False, True):
        encoder.stem.reproducible = reproducible
        delta = torch.zeros_like(encoder.stem.weight, requires_grad=True)
        found.append(torch.autograd.grad(encoder(x, delta).square().sum(), delta)[0])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_the_earlier_spelling_is_the_same_architecture(tmp_path: Path) -> None:
    assert ModelConfig(arch="timm/test_vit").arch == "timm:test_vit"
    assert build_encoder("timm/test_vit", image_size=32).arch == "timm:test_vit"
    state = build_encoder("timm:test_vit", image_size=32).state_dict()
    card = EncoderCard(arch="timm/test_vit", feature_dim=64, input_size=32, mean=(0.5,) * 3, std=(0.2,) * 3)
    folder = save_encoder(tmp_path / "encoder", state, card)
    text = (folder / "card.json").read_text().replace("timm:test_vit", "timm/test_vit")  # as it wrote it
    (folder / "card.json").write_text(text)
    encoder, read = load_encoder(folder)
    assert (encoder.arch, read.arch) == ("timm:test_vit", "timm:test_vit")


def test_a_timm_name_is_no_code_and_may_stand_in_a_file(tmp_path: Path) -> None:
    for name in ("timm:test_vit", "torchvision:IMAGENET1K_V1", "random:3"):
        assert not is_plugin(name) and not names_code(name)
    assert is_plugin("timmy:test_vit")
    assert not is_arch("timm:test_vit:x") and not is_arch("timm:x/y") and not is_arch("json:x,y=1")
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"model": {"arch": "timm:test_vit,reg_tokens=2"}}))
    assert parse("pretrain", ["--config", str(tmp_path / "a.yaml")]).model.arch == "timm:test_vit,reg_tokens=2"


def test_arguments_are_part_of_the_name() -> None:
    arch = "timm:test_vit,global_pool=avg,init_values=1e-05,mlp_layer=SwiGLUPacked,no_embed_class=true,reg_tokens=2"
    name, arguments = split_arch(arch)
    assert join_arch(name, arguments) == arch
    encoder = build_encoder(arch, image_size=32)
    reference = timm.create_model(
        "test_vit", num_classes=0, img_size=32, global_pool="avg", init_values=1e-5, reg_tokens=2, no_embed_class=True,
        mlp_layer=timm.layers.SwiGLUPacked,
    ).eval()  # fmt: skip
    encoder.load_state_dict(reference.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder.eval()(x), reference(x))


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("timm:test_vit,reg_token=2", "reg_token is not among the arguments; did you mean reg_tokens"),
        ("timm:test_vit,checkpoint_path=x.pth", "checkpoint_path is not among the arguments"),
        ("timm:test_vit,mlp_layer=Linear", "mlp_layer=Linear"),
        ("timm:test_resnet,reg_tokens=2", "timm cannot build it"),
        ("timm:vit_small_patch16_224.dino", "use --model.arch timm:vit_small_patch16_224 --model.weights timm:vit_sm"),
    ],
)
def test_what_is_wrong_with_a_name_is_said_in_one_line(arch: str, words: str) -> None:
    with pytest.raises(InputError) as error:
        build_encoder(arch, image_size=32)
    assert words in str(error.value) and "\n" not in str(error.value)


def pooled_by_hand(encoder: Backbone, x: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """Row by row and patch by patch."""
    rows = []
    tokens = encoder.tokens(x)
    for prefix_PD, patches_hwD in zip(tokens.prefix, tokens.patches, strict=True):
        mean_D = sum(patches_hwD[i, j] for i in range(len(patches_hwD)) for j in range(patches_hwD.shape[1])) / (
            patches_hwD.shape[0] * patches_hwD.shape[1]
        )
        rows.append({"class": prefix_PD[:1], "mean": mean_D[None]}.get(pooling, torch.stack([prefix_PD[0], mean_D])))
    return torch.stack(rows).flatten(1)


@pytest.mark.parametrize("pooling", ["class", "mean", "both"])
def test_pooling_of_a_vit_is_that_of_its_tokens(pooling: Pooling, tmp_path: Path) -> None:
    arch = "timm:test_vit,reg_tokens=2"
    torch.manual_seed(1)
    encoder = build_encoder(arch, image_size=48, pooling=pooling).eval()
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        features = encoder(x)
        torch.testing.assert_close(features, pooled_by_hand(encoder, x, pooling), rtol=1e-5, atol=1e-5)
    assert features.shape == (2, 128 if pooling == "both" else 64) and encoder.feature_dim == features.shape[1]
    dim = encoder.feature_dim
    card = EncoderCard(
        arch=arch, feature_dim=dim, input_size=48, mean=(0.5,) * 3, std=(0.2,) * 3, pooling=pooling
    )  # fmt: skip
    read, _ = load_encoder(save_encoder(tmp_path / "encoder", encoder.state_dict(), card))
    torch.testing.assert_close(read(x), features)
    found = ResolvedEncoder(encoder, card, None, "here")
    if pooling == "both":
        assert "features differ by" in export(found, TARGETS["onnx"], tmp_path / "it.onnx")
        with pytest.raises(InputError, match="timm has no pooling of class token and mean"):
            export(found, TARGETS["timm"], tmp_path / "it.safetensors")
    else:
        assert "features differ by" in export(found, TARGETS["timm"], tmp_path / "it.safetensors")


@pytest.mark.parametrize("arch", ["resnet18", "timm:test_resnet", "timm:test_convnext", "timm:test_vit3"])
def test_a_body_without_class_token_has_one_pooling(arch: str) -> None:
    torch.manual_seed(2)
    encoder = build_encoder(arch, image_size=64).eval()
    torch.manual_seed(2)
    mean = build_encoder(arch, image_size=64, pooling="mean").eval() if arch != "timm:test_vit3" else None
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        tokens = encoder.tokens(x)
        if mean is not None:
            assert torch.equal(mean(x), encoder(x))
        if arch in ("resnet18", "timm:test_resnet"):
            torch.testing.assert_close(tokens.patches.mean((1, 2)), encoder(x), rtol=1e-5, atol=1e-6)
    assert tokens.patches.shape[0] == 2 and tokens.patches.shape[-1] == encoder.feature_dim
    with pytest.raises(InputError, match="model.pooling is 'class'"):
        build_encoder(arch, image_size=64, pooling="class")


@pytest.mark.parametrize("arch", ["timm:test_vit,reg_tokens=2", "timm:test_vit2", "timm:test_convnext", "resnet18"])
def test_one_pass_gives_tokens_and_every_pooling(arch: str) -> None:
    torch.manual_seed(3)
    encoder = build_encoder(arch, image_size=64).eval()
    x = torch.randn(2, 3, 64, 96)
    passes: list[int] = []
    encoder.stem.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        found = encoder.encode(x, ["default", *encoder.poolings])
        assert len(passes) == 1
        for one, other in zip(found.tokens, encoder.tokens(x), strict=True):
            torch.testing.assert_close(one, other)
        torch.testing.assert_close(found.pooled["default"], encoder(x))
        for way in encoder.poolings:
            if "test_vit2" not in arch:
                torch.testing.assert_close(found.pooled[way], pooled_by_hand(encoder, x, way), rtol=1e-5, atol=1e-5)
    expected = {"timm:test_vit,reg_tokens=2": ("class", "mean", "both"), "timm:test_vit2": ("mean",)}
    assert encoder.poolings == expected.get(arch, ())
    if arch == "timm:test_vit2":  # its own pooling, before its last norm
        torch.testing.assert_close(found.pooled["mean"], found.pooled["default"])


def test_larger_patches_of_a_last_stage_keep_their_grid() -> None:
    encoder = build_encoder("timm:efficientformer_l1").eval()
    with torch.no_grad():
        found = encoder.encode(torch.randn(1, 3, 224, 224))
    assert found.tokens.patches.shape == (1, 7, 7, 448) and found.tokens.prefix.shape == (1, 0, 448)
