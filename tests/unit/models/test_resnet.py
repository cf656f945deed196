"""The encoder is torchvision's, its stem takes a perturbation, and only clean passes move running statistics."""

from typing import Any

import pytest
import torch
import torchvision

from ca2cl.errors import InputError
from ca2cl.models.backbone import build_encoder
from ca2cl.models.batch_norm import BatchNorm, commit_statistics, recording
from ca2cl.models.heads import Network
from ca2cl.models.resnet import ARCHITECTURES


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_encoder_has_torchvisions_keys_and_features(arch: str) -> None:
    encoder = build_encoder(arch).eval()
    reference = torchvision.models.get_model(arch).eval()
    expected = {key: value for key, value in reference.state_dict().items() if not key.startswith("fc.")}
    encoder.load_state_dict(expected, strict=True)
    reference.fc = torch.nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    features = encoder(x)
    assert features.shape == (2, encoder.feature_dim)
    torch.testing.assert_close(features, reference(x))


def test_a_perturbation_acts_as_if_written_into_the_weight_and_is_not() -> None:
    encoder = build_encoder("resnet18").eval()
    delta = torch.randn_like(encoder.conv1.weight)
    x = torch.randn(2, 3, 32, 32)
    before = encoder.conv1.weight.clone()
    through_input = encoder(x, delta)
    assert torch.equal(encoder.conv1.weight, before)
    with torch.no_grad():
        encoder.conv1.weight += delta
    torch.testing.assert_close(through_input, encoder(x))


def test_an_adversarial_pass_leaves_the_running_statistics_alone() -> None:
    network = Network(build_encoder("resnet18")).train()
    x = torch.randn(4, 3, 32, 32)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    quiet = network(x)
    commit_statistics(network)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    loud = network(x, None, 0)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    commit_statistics(network)
    torch.testing.assert_close(quiet, loud)
    changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    assert {key.rsplit(".", 1)[1] for key in changed} == {"running_mean", "running_var", "num_batches_tracked"}


def test_frozen_normalisation_ignores_the_batch() -> None:
    encoder = build_encoder("resnet18", "frozen").train()
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(encoder(x)[:1], encoder(x[:1]), rtol=1e-4, atol=1e-5)


def test_embeddings_are_unit_vectors_in_full_precision_under_autocast() -> None:
    network = Network(build_encoder("resnet18")).train()
    with torch.autocast("cpu", torch.bfloat16):
        z, g = network(torch.randn(4, 3, 32, 32))
    assert z.dtype == g.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(g.norm(dim=1), torch.ones(4))


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(InputError, match="resnet19.*resnet18, resnet34, resnet50"):
        build_encoder("resnet19")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_identity_blocks_pass_on_what_their_shortcut_gives(arch: str) -> None:
    encoder = build_encoder(arch, identity_blocks=True).train()
    plain = [block for layer in (encoder.layer1, encoder.layer4) for block in layer if block.downsample is None]
    assert plain
    for block in plain:
        channels = block.conv1.in_channels
        x = torch.rand(2, channels, 4, 4)
        torch.testing.assert_close(block(x), x)


def slow_batch_norm(x: torch.Tensor, groups: list[list[int]]) -> torch.Tensor:
    """Every group and channel by the definition, one at a time."""
    out = torch.empty_like(x)
    for rows in groups:
        for channel in range(x.shape[1]):
            values = x[rows, channel]
            mean = values.sum() / values.numel()
            variance = ((values - mean) ** 2).sum() / values.numel()
            out[rows, channel] = (values - mean) / torch.sqrt(variance + 1e-5)
    return out


def test_lane_group_normalises_every_run_of_rows_by_itself() -> None:
    torch.manual_seed(0)
    layer = BatchNorm(3, "lane_group", group=2).double().train()
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), slow_batch_norm(x, [[0, 1], [2, 3], [4, 5]]))
    assert torch.equal(layer(x)[:4], layer(x[:4]))  # to the last bit, whatever comes along


@pytest.mark.parametrize("norm", ["sync", "lane_group"])
def test_running_statistics_move_once_a_view_however_many_passes_recorded_it(norm: Any) -> None:
    torch.manual_seed(0)
    layer = BatchNorm(3, norm, group=2).double().train()
    x = torch.randn(8, 3, 4, 4, dtype=torch.float64) * 3 + 1
    for slot, rows in ((0, x[:2]), (1, x[4:6]), (0, x[2:4]), (1, x[6:])):  # as micro-batches interleave two views
        with recording(layer, slot):
            layer(rows)
    commit_statistics(layer)
    mean, variance = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for view in (x[:4], x[4:]):
        parts = view.split(2)
        mean = 0.9 * mean + 0.1 * sum(part.mean((0, 2, 3)) for part in parts) / 2
        variance = 0.9 * variance + 0.1 * sum(part.var((0, 2, 3), unbiased=True) for part in parts) / 2
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, variance)
    assert int(layer.num_batches_tracked) == 2
    commit_statistics(layer)
    torch.testing.assert_close(layer.running_mean, mean)  # nothing recorded, nothing moved
