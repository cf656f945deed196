"""Feature maps of bodies: their sizes, and that they are those that the encoder's own features come from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ca2cl.models.backbone import Backbone, build_encoder

SWIN = "timm:swin_tiny_patch4_window7_224,embed_dim=24,window_size=2"
PLAIN = {"timm:test_vit": 16, "timm:vit_tiny_patch16_224,patch_size=14,depth=2": 14}
HIERARCHICAL = ("timm:test_resnet", "timm:test_convnext", "timm:test_efficientnet", SWIN)


def made(arch: str, side: int) -> Backbone:
    torch.manual_seed(1)
    encoder = build_encoder(arch, image_size=side).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.ndim == 1:  # norms and layer scales of a new body would hide one another
                parameter.copy_(0.5 + torch.rand_like(parameter))
    return encoder


def last_map(encoder: Backbone, map_BChw: Tensor) -> Tensor:
    """Behind what the encoder has after its last stage."""
    body = getattr(encoder, "body", None)
    if hasattr(body, "conv_head"):
        return body.bn2(body.conv_head(map_BChw))
    if encoder.arch == SWIN:
        return body.norm(map_BChw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return map_BChw


@pytest.mark.parametrize("arch", [*HIERARCHICAL, *PLAIN])
def test_the_last_map_is_where_the_encoders_features_come_from(arch: str) -> None:
    side = 8 * PLAIN.get(arch, 16)
    encoder, x = made(arch, side), torch.randn(2, 3, side, side)
    with torch.no_grad():
        patches_BhwD, maps = encoder.tokens(x).patches, encoder.maps(x)
        torch.testing.assert_close(last_map(encoder, maps[-1]).permute(0, 2, 3, 1), patches_BhwD)
    assert [level.stride for level in encoder.levels] == ([PLAIN[arch]] if arch in PLAIN else [4, 8, 16, 32])
    for level, one in zip(encoder.levels, maps, strict=True):
        assert one.shape == (2, level.channels, side // level.stride, side // level.stride)


@pytest.mark.parametrize("arch", [*HIERARCHICAL, *PLAIN])
def test_images_of_any_size_are_seen_through_the_same_tensors(arch: str) -> None:
    stride = PLAIN.get(arch, 32)
    encoder = made(arch, 4 * stride)
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    encoder.take_any_size()
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())
    x = torch.randn(1, 3, 8 * stride, 8 * stride)
    other = build_encoder(arch, image_size=8 * stride).eval()  # made for that size, as pre-training would make it
    other.load_state_dict(state)
    with torch.no_grad():
        for one, wanted in zip(encoder.maps(x), other.maps(x), strict=True):
            torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-4)
        last = encoder.maps(torch.randn(1, 3, 3 * stride, 5 * stride))[-1]
    assert last.shape[-2:] == (3, 5)


def test_stages_are_numbered_from_the_stem() -> None:
    for arch, count in (("resnet18", 5), ("timm:test_convnext", 5), ("timm:test_vit", 7), (SWIN, 5)):
        encoder = build_encoder(arch, image_size=64)
        numbers = encoder.layers(coarse=True)
        assert set(numbers.values()) == set(range(count))
        stem = next(name for name, module in encoder.named_modules() if module is encoder.stem)
        assert numbers[f"{stem}.weight"] == 0
        assert isinstance(encoder, nn.Module) and max(encoder.layers().values()) >= count - 1
