"""Bodies and pyramids of detectors: sizes, the simple pyramid's arithmetic, freezing, optimizer, what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from ca2cl.config import OptimConfig
from ca2cl.detection.network.body import build_body, check_body, load_body, pyramid_levels, pyramid_maps
from ca2cl.detection.network.optimizer import detector_optimizer
from ca2cl.detection.network.pyramid import Pyramid, SimplePyramid
from ca2cl.errors import InputError
from ca2cl.models.backbone import build_encoder
from ca2cl.models.batch_norm import BatchNorm
from ca2cl.models.features import Level

VIT14 = "timm:vit_tiny_patch16_224,patch_size=14,depth=2"


@pytest.mark.parametrize("arch", ["timm:test_convnext", "timm:test_efficientnet", "timm:test_vit", VIT14])
def test_levels_have_strides_of_powers_of_two(arch: str) -> None:
    torch.manual_seed(0)
    side = 56 if arch == VIT14 else 64
    body = build_body(arch, "sync", side)
    x = torch.randn(1, 3, 96, 64)
    for finest, extra, strides in (
        (4, LastLevelMaxPool(), (4, 8, 16, 32, 64)),
        (8, LastLevelP6P7(256, 256), (8, 16, 32, 64, 128)),
    ):
        levels = Pyramid(body, finest, extra, "sync").eval()(x)
        assert [tuple(one.shape) for one in levels.values()] == [
            (1, 256, -(-96 // stride), -(-64 // stride)) for stride in strides
        ]
    if arch == VIT14:  # it sees the image at 14/16 of its size
        seen = F.interpolate(x, (84, 56), mode="bilinear", align_corners=False, antialias=True)
        torch.testing.assert_close(pyramid_maps(body, x), body.maps(seen))
        assert pyramid_levels(body) == (Level(192, 16),)


def norm(x_CHW: Tensor, layer: nn.Module) -> Tensor:
    """LayerNorm over the channels of every position."""
    assert isinstance(layer, nn.LayerNorm)
    centred = x_CHW - x_CHW.mean(0)
    scaled = centred / (centred.square().mean(0) + 1e-6).sqrt()
    return scaled * layer.weight[:, None, None] + layer.bias[:, None, None]


def enlarged(x_CHW: Tensor, layer: nn.Module) -> Tensor:
    """A transposed convolution of kernel and stride 2, pixel by pixel."""
    assert isinstance(layer, nn.ConvTranspose2d) and layer.bias is not None
    _, height, width = x_CHW.shape
    out = torch.empty(layer.out_channels, 2 * height, 2 * width)
    for y in range(2 * height):
        for x in range(2 * width):
            out[:, y, x] = layer.weight[:, :, y % 2, x % 2].T @ x_CHW[:, y // 2, x // 2] + layer.bias
    return out


@torch.no_grad()
def test_the_simple_pyramid_is_the_papers() -> None:
    torch.manual_seed(0)
    pyramid = SimplePyramid(Level(8, 16), (4, 8, 16, 32), LastLevelMaxPool())
    for parameter in pyramid.parameters():
        parameter.copy_(torch.randn_like(parameter))
    x_CHW = torch.randn(8, 4, 6)
    four, eight, sixteen, thirty_two = (list(scale) for scale in pyramid.scales)
    first = enlarged(x_CHW, four[0])
    wanted = {
        "0": (enlarged(F.gelu(norm(first, four[1])), four[3]), four[4:]),
        "1": (enlarged(x_CHW, eight[0]), eight[1:]),
        "2": (x_CHW, sixteen),
        "3": (x_CHW.view(8, 2, 2, 3, 2).amax((2, 4)), thirty_two[1:]),
    }
    found = pyramid({"0": x_CHW[None]})
    assert list(found) == [*wanted, "pool"]
    for name, (scaled, (narrow, smooth)) in wanted.items():
        h = norm(torch.einsum("oc,chw->ohw", narrow[0].weight[:, :, 0, 0], scaled), narrow[1])
        padded, (_, height, width) = F.pad(h, (1, 1, 1, 1)), h.shape
        windows = [padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3)]
        h = sum(
            torch.einsum("oc,chw->ohw", smooth[0].weight[:, :, k // 3, k % 3], one) for k, one in enumerate(windows)
        )  # type: ignore[assignment]
        torch.testing.assert_close(found[name][0], norm(h, smooth[1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arch", "stages", "still", "moves"),
    [
        ("timm:test_efficientnet", 2, ("body.conv_stem", "body.bn1", "body.blocks.0"), "body.blocks.1"),
        ("timm:test_convnext", 3, ("body.stem", "body.stages.0", "body.stages.1"), "body.stages.2"),
        ("timm:test_vit", 3, ("body.cls_token", "body.pos_embed", "body.patch_embed", "body.blocks.0", "body.blocks.1"),
         "body.blocks.2"),
    ],
)  # fmt: skip
def test_stages_are_frozen_from_the_stem(arch: str, stages: int, still: tuple[str, ...], moves: str) -> None:
    body = build_body(arch, "sync", 64, stages)
    pyramid = Pyramid(body, 4, LastLevelMaxPool(), "sync")
    sum(one.square().mean() for one in pyramid(torch.randn(2, 3, 64, 64)).values()).backward()  # type: ignore[union-attr]
    for name, parameter in body.named_parameters():
        if name.startswith(still):
            assert not parameter.requires_grad, name
        assert parameter.requires_grad == (parameter.grad is not None), name  # what no map depends on is not trained
    assert any(p.grad is not None for name, p in body.named_parameters() if name.startswith(moves))
    for name, layer in body.named_modules():
        if isinstance(layer, BatchNorm):
            assert (layer.norm == "frozen") == name.startswith(still), name


def test_rates_fall_towards_the_stem_and_vectors_do_not_decay() -> None:
    body = build_body("timm:test_vit", "sync", 64)
    network = Pyramid(body, 4, LastLevelMaxPool(), "sync")
    optimizer = detector_optimizer(OptimConfig(name="adamw", weight_decay=0.05, layer_decay=0.5), network, body)
    assert isinstance(optimizer, torch.optim.AdamW)
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    scale, decay = (
        {name: groups[id(p)][key] for name, p in network.named_parameters()} for key in ("lr_scale", "weight_decay")
    )
    assert scale["fpn.scales.0.0.weight"] == 1 and scale["body.body.blocks.5.attn.qkv.weight"] == 0.5
    assert scale["body.body.patch_embed.proj.weight"] == 0.5**7
    assert (
        decay["body.body.pos_embed"] == decay["fpn.scales.0.1.weight"] == 0 and decay["fpn.scales.0.0.weight"] == 0.05
    )
    plain = detector_optimizer(OptimConfig(name="sgd_plain"), network, body)
    assert isinstance(plain, torch.optim.SGD) and len(plain.param_groups) == 1


def test_what_no_pyramid_stands_on_is_one_line() -> None:
    for arch, told in (
        ("timm:beit_base_patch16_224,depth=1", "takes no images of other sizes than its tiles .*doesn't match"),
        ("timm:visformer_tiny", "has feature maps at strides 8, 16, 32, not one map or strides 4, 8, 16, 32; use a"),
    ):
        with pytest.raises(InputError, match=f"^detect is not for {arch}: it {told}"):
            check_body(build_encoder(arch))
    vit = build_encoder("timm:test_vit", image_size=64).eval()
    with pytest.raises(InputError, match="frozen_stages is 8: use 0 to 7, the stem and 6 stages of timm:test_vit"):
        check_body(vit, 8)
    check_body(vit, 7)
    assert not vit.training and all(parameter.requires_grad for parameter in vit.parameters())
    body = build_body("timm:test_vit", "sync", 64)
    state = dict(vit.state_dict())
    load_body(body, state, "here")
    assert all(torch.equal(tensor, state[name]) for name, tensor in body.state_dict().items())
    del state["norm.bias"]
    with pytest.raises(InputError, match=r"here: does not fill the detector's backbone exactly .*norm.bias"):
        load_body(body, state, "here")
