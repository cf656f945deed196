"""Bodies other than ResNets behind the same seam: timm's by name, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from ca2cl.config import DataConfig, ModelConfig, RunConfig
from ca2cl.errors import InputError
from ca2cl.export.run import TARGETS, export
from ca2cl.models.backbone import TRUSTED, build_encoder, check_arch, check_trusted, has_batch_norm, is_arch
from ca2cl.models.batch_norm import BatchNorm, commit_statistics, recording
from ca2cl.models.encoder_io import EncoderCard, load_encoder, make_encoder, save_encoder
from ca2cl.models.heads import Network
from ca2cl.models.perturbed_conv import Stem
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.pretrain.memory.activations import bytes_a_tile
from ca2cl.pretrain.shares import lane_groups, micro_batch
from ca2cl.registry.resolve import ResolvedEncoder, resolve_encoder

VIT, RESNET = "timm:test_vit", "timm:test_resnet"
SIDE = 48


def timms_own(arch: str) -> nn.Module:
    size = {"img_size": SIDE} if "vit" in arch else {}
    model: nn.Module = timm.create_model(arch.removeprefix("timm:"), num_classes=0, **size)
    return model.eval()


def card(arch: str = VIT, features: int = 64, side: int = SIDE) -> EncoderCard:
    return EncoderCard(
        arch=arch, feature_dim=features, input_size=side, mean=(0.5, 0.4, 0.6), std=(0.2, 0.3, 0.25)
    )  # fmt: skip


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet"])
def test_a_timm_body_has_timms_tensors_and_features(name: str) -> None:
    arch = f"timm:{name}"
    reference, encoder = timms_own(arch), build_encoder(arch, image_size=SIDE).eval()
    encoder.load_state_dict(reference.state_dict(), strict=True)
    assert list(encoder.state_dict()) == list(reference.state_dict())
    x = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        features = encoder(x)
        torch.testing.assert_close(features, reference(x), rtol=1e-5, atol=1e-5)
    assert features.shape == (2, encoder.feature_dim)


@pytest.mark.parametrize("arch", [VIT, RESNET])
def test_a_perturbation_acts_as_if_written_into_the_stem(arch: str) -> None:
    encoder = build_encoder(arch, image_size=SIDE).eval()
    x, delta = torch.randn(2, 3, SIDE, SIDE), torch.randn_like(encoder.stem.weight)
    with torch.no_grad():
        clean, perturbed = encoder(x), encoder(x, delta)
        assert torch.equal(encoder(x), clean)
        encoder.stem.weight += delta
        torch.testing.assert_close(perturbed, encoder(x))
    assert not torch.allclose(clean, perturbed)


def test_a_perturbed_stem_with_a_bias_has_autograds_gradients() -> None:
    plain = nn.Conv2d(3, 5, 4, stride=4).double()
    x, outer = (torch.randn(6, n, side, side, dtype=torch.float64) for n, side in ((3, 16), (5, 4)))
    delta = torch.randn(5, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    stem = Stem.of(plain)
    found = torch.autograd.grad(stem(x, delta), [stem.weight, stem.bias, delta], outer)  # type: ignore[list-item]
    through = torch.nn.functional.conv2d(x, stem.weight + delta, stem.bias, stride=4)
    for ours, expected in zip(found, torch.autograd.grad(through, [stem.weight, stem.bias, delta], outer), strict=True):  # type: ignore[list-item]
        torch.testing.assert_close(ours, expected)


def test_batch_norms_of_a_timm_body_follow_model_norm() -> None:
    encoder = build_encoder(RESNET, "lane_group", group=2, image_size=SIDE).train()
    layers = [layer for layer in encoder.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert layers and all(isinstance(layer, BatchNorm) and layer.norm == "lane_group" for layer in layers)
    before = {name: value.clone() for name, value in encoder.state_dict().items() if "running" in name}
    x = torch.randn(4, 3, SIDE, SIDE)
    encoder(x)
    assert all(torch.equal(encoder.state_dict()[name], value) for name, value in before.items())
    with recording(encoder, 0):
        encoder(x)
    commit_statistics(encoder)
    assert not any(torch.equal(encoder.state_dict()[name], value) for name, value in before.items())


def test_nothing_is_dropped_while_training() -> None:
    encoder = build_encoder("timm:swin_tiny_patch4_window7_224", image_size=64).train()  # timm's default drops paths
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(encoder(x), encoder(x)) and not has_batch_norm(encoder)


@pytest.mark.parametrize("arch", [VIT, RESNET])
def test_an_estimate_of_memory_is_what_autograd_keeps(arch: str) -> None:
    network, kept = Network(build_encoder(arch, "frozen", image_size=96)).train(), {}
    alive = []

    def keep(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(torch.randn(4, 3, 96, 96))
    found = sum(size for place, size in kept.items() if place not in own) / 4
    assert bytes_a_tile(Network, arch, 96, "no") == pytest.approx(found, rel=0.15)


def test_position_embeddings_of_another_size_are_resampled_and_other_tiles_pass() -> None:
    torch.manual_seed(0)
    small, large = build_encoder(VIT, image_size=32).eval(), build_encoder(VIT, image_size=96)
    found = make_encoder(small.state_dict(), VIT, "here", 96)
    assert found.state_dict()["pos_embed"].shape == large.state_dict()["pos_embed"].shape
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():  # either way the same embeddings
        torch.testing.assert_close(found(x), small(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="timm:test_vit has patches of 16 pixels; use a multiple, as 32"):
        small(torch.randn(1, 3, 40, 40))


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("resnet81", "did you mean resnet18"),
        ("vit", "use one of resnet18, resnet34, resnet50, timm:NAME, or package.module:builder"),
        ("timm:vit_tiny_patch16_242", "did you mean timm:vit_tiny_patch16_224"),
        ("timm:hf-hub:somebody/something", "use one of"),
        ("timm:dm_nfnet_f0", "its first convolution is no plain one (ScaledStdConv2dSame)"),
        ("no_such_module_here:body", "no module 'no_such_module_here'"),
        ("json:dumps_it", "json has no 'dumps_it'"),
    ],
)
def test_what_is_wrong_with_an_architecture_is_said_in_one_line(arch: str, words: str) -> None:
    with pytest.raises(InputError) as error:
        build_encoder(arch)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_card_imports_nothing_that_the_user_has_not_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert is_arch("some.where:body") and not is_arch("os.system") and not is_arch("timm:../x") and not is_arch(3)
    folder = save_encoder(tmp_path / "encoder", {"stem.weight": torch.zeros(1)}, card("antigravity:fly"))
    with pytest.raises(InputError, match="code outside ca2cl; if you trust it, set CA2CL_BACKBONES=antigravity:fly"):
        load_encoder(folder)
    monkeypatch.setenv(TRUSTED, "a:b, some.where:body")
    check_trusted("some.where:body", "here")
    check_trusted("other.place:body", "here", "other.place:body")
    check_arch(VIT)


@pytest.fixture(scope="module")
def found() -> ResolvedEncoder:
    return made(VIT)


def made(arch: str) -> ResolvedEncoder:
    torch.manual_seed(3)
    encoder = build_encoder(arch, image_size=SIDE).eval()
    return ResolvedEncoder(encoder, card(arch, encoder.feature_dim), None, "here")


@pytest.mark.parametrize("arch", [VIT, RESNET])
@pytest.mark.parametrize("name", ["timm", "onnx", "safetensors"])
def test_a_timm_body_is_exported(name: str, arch: str, tmp_path: Path) -> None:
    found = made(arch)
    suffix = {"timm": ".safetensors", "onnx": ".onnx"}.get(name, "")
    told = export(found, TARGETS[name], tmp_path / f"it{suffix}")
    assert "features differ by" in told  # by the other program's own reading
    if name == "timm":
        names: dict[str, Any] = {}
        exec("\n".join(told.rstrip().splitlines()[-3:]), names)  # the lines that load it
        assert names["model"](torch.zeros(1, 3, SIDE, SIDE)).shape == (1, found.card.feature_dim)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("torchvision", "is not for timm:test_vit, only for resnet18, resnet34, resnet50"),
        ("detectron2", "has no timm:test_vit, only resnet18, resnet34, resnet50; export --to timm or onnx, or train"),
    ],
)
def test_what_is_of_resnets_says_so(name: str, told: str, found: ResolvedEncoder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{name} {told}"):
        export(found, TARGETS[name], tmp_path / "it.pth")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="'torchvision:IMAGENET1K_V1' is not for timm:test_vit"):
        resolve_encoder("torchvision:IMAGENET1K_V1", arch=VIT)


def test_a_body_without_batch_norm_takes_micro_batches_and_needs_no_groups() -> None:
    run = RunConfig(batch_size=24, micro_batch_size=6)
    for norm in ("sync", "lane_group", "frozen"):
        config = PretrainConfig(
            data=DataConfig(lanes=8, image_size=SIDE), model=ModelConfig(arch=VIT, norm=norm), run=run
        )
        assert micro_batch(config, 2) == 6 and lane_groups(config, 2, 6) is None
    with pytest.raises(InputError, match="under model.norm sync BatchNorm sees one micro-batch"):
        micro_batch(PretrainConfig(data=config.data, model=ModelConfig(arch=RESNET), run=run), 2)


@pytest.mark.parametrize("arch", [VIT, RESNET])
def test_a_registered_timm_body_is_served(arch: str, tmp_path: Path) -> None:
    import io
    from importlib.metadata import version

    import mlflow
    import numpy as np
    from PIL import Image

    from ca2cl.models.preprocess import preprocess
    from ca2cl.registry.register import save_pyfunc

    found = made(arch)
    folder = save_encoder(tmp_path / "encoder", found.encoder.state_dict(), found.card)
    save_pyfunc(tmp_path / "model", folder, found.card)
    assert f"timm=={version('timm')}" in (tmp_path / "model" / "requirements.txt").read_text().splitlines()
    tile = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(tile).save(out, "PNG")
    served = mlflow.pyfunc.load_model(str(tmp_path / "model")).predict([out.getvalue()])
    with torch.inference_mode():
        x = preprocess(torch.from_numpy(tile)[None], SIDE, found.card.mean, found.card.std)
        np.testing.assert_allclose(served, found.encoder(x).numpy(), rtol=1e-5, atol=1e-5)
