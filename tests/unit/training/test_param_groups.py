"""Parameter groups against their definition, parameter by parameter."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ca2cl.config import OptimConfig
from ca2cl.errors import InputError
from ca2cl.models.backbone import Backbone, build_encoder
from ca2cl.models.classifier import Classifier
from ca2cl.models.heads import Network
from ca2cl.models.perturbed_conv import Stem
from ca2cl.runtime.accelerator import build_accelerator
from ca2cl.training.checkpoint import Checkpointer, restore
from ca2cl.training.engine import AccelerateEngine
from ca2cl.training.optim import build_optimizer

LAYERS = OptimConfig(name="adamw", lr=0.1, weight_decay=0.05, layer_decay=0.5, decay_all=False)
SPARED = {"encoder.body.cls_token", "encoder.body.pos_embed"}


def vit_layer(name: str) -> int:
    """Of timm/test_vit, which has six blocks: its last norm is trained with the last of them, heads as a seventh."""
    if not name.startswith("encoder."):
        return 7
    if ".blocks." in name:
        return int(name.split(".blocks.")[1].split(".")[0]) + 1
    return 6 if name.startswith("encoder.body.norm.") else 0


def resnet_layer(name: str) -> int:
    """Of a ResNet-18, of four stages of two blocks."""
    if not name.startswith("encoder."):
        return 9
    if ".layer" not in name:
        return 0
    stage, block = name.removeprefix("encoder.layer").split(".")[:2]
    return 2 * (int(stage) - 1) + int(block) + 1


@pytest.mark.parametrize(("arch", "layer", "heads"), [("timm:test_vit", vit_layer, 7), ("resnet18", resnet_layer, 9)])
def test_every_parameter_has_the_rate_and_decay_of_its_layer_and_kind(arch: str, layer: Any, heads: int) -> None:
    network = Network(build_encoder(arch, image_size=32))
    config = OptimConfig(**{**vars(LAYERS), "freeze_layers": 2, "freeze_steps": 3})
    names = {id(p): name for name, p in network.named_parameters()}
    groups = build_optimizer(config, network, network.encoder).param_groups
    found = {names[id(p)]: group for group in groups for p in group["params"]}
    assert len(found) == len(names) == sum(len(group["params"]) for group in groups)
    for name, parameter in network.named_parameters():
        group = found[name]
        assert group["lr_scale"] == pytest.approx(0.5 ** (heads - layer(name))), name
        assert group["weight_decay"] == (0.0 if parameter.ndim < 2 or name in SPARED else 0.05), name
        assert group["frozen_steps"] == (3 if layer(name) <= 2 else 0), name


def test_a_classifiers_head_has_the_full_rate() -> None:
    """Fine-tuning takes the same settings."""
    network = Classifier(build_encoder("resnet18"), 3)
    groups = build_optimizer(LAYERS, network, network.encoder).param_groups
    (scale,) = {group["lr_scale"] for group in groups for p in group["params"] if p is network.head.weight}
    (stem,) = {group["lr_scale"] for group in groups for p in group["params"] if p is network.encoder.stem.weight}
    assert (scale, stem) == (1.0, 0.5**9)


def test_settings_that_tell_no_parameters_apart_make_one_group() -> None:
    network = Network(build_encoder("resnet18"))
    (group,) = build_optimizer(OptimConfig(), network, network.encoder).param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in network.parameters()]


class Chain(nn.Module):
    """Three layers and a head, with the interface of an encoder."""

    arch = "chain"

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 1)

    def layers(self) -> dict[str, int]:
        return {f"body.{n}.{kind}": n for n in range(3) for kind in ("weight", "bias")}

    def no_weight_decay(self) -> list[str]:
        return []

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.body:
            x = x + layer(x).tanh()
        y: Tensor = self.head(x)
        return y


def make_engine(config: OptimConfig, seed: int = 0) -> AccelerateEngine:
    torch.manual_seed(seed)
    network = Chain()
    return AccelerateEngine(build_accelerator(), network, build_optimizer(config, network, network))


def walk(engine: AccelerateEngine, steps: range) -> list[dict[str, Tensor]]:
    """The weights before every step, and at the end."""
    seen = [{name: p.detach().clone() for name, p in engine.bare.named_parameters()}]
    for step in steps:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        engine.backward((engine.network(x) - x.sum(1, keepdim=True)).square().mean())
        engine.optimizer_step(0.02, 1.0, None, step)
        seen.append({name: p.detach().clone() for name, p in engine.bare.named_parameters()})
    return seen


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lars"])
def test_frozen_parameters_are_the_same_bit_for_bit_until_their_step_and_then_move(name: Any) -> None:
    config = OptimConfig(name=name, weight_decay=0.1, freeze_layers=1, freeze_steps=4)
    seen = walk(make_engine(config), range(6))
    for key, first in seen[0].items():
        frozen = key.startswith(("body.0", "body.1"))
        for step in range(1, 7):
            assert torch.equal(seen[step][key], first) == (frozen and step <= 4), (key, step)


def test_adams_moments_follow_the_gradient_while_a_parameter_is_frozen() -> None:
    """Its first update is then of the usual size: with a network that does not move, that of a run that never froze."""
    config = OptimConfig(name="adam", weight_decay=0.0, freeze_layers=1, freeze_steps=5)
    engine, gradients = make_engine(config), defaultdict[str, list[Tensor]](list)
    for step in range(6):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        engine.backward((engine.network(x) - x.sum(1, keepdim=True)).square().mean())
        before = {key: p.detach().clone() for key, p in engine.bare.named_parameters()}
        for key, p in engine.bare.named_parameters():
            assert p.grad is not None
            gradients[key].append(p.grad.clone())
        engine.optimizer_step(0.02, None, None, step)
    for key in ("body.0.weight", "body.1.bias"):
        first = second = torch.zeros_like(before[key])
        for grad in gradients[key]:
            first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad.square()
        update = 0.02 * (first / (1 - 0.9**6)) / ((second / (1 - 0.999**6)).sqrt() + 1e-8)
        moved = before[key] - dict(engine.bare.named_parameters())[key].detach()
        torch.testing.assert_close(moved, update, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_a_run_with_groups_goes_on_bit_for_bit(name: Any, tmp_path: Path) -> None:
    config = OptimConfig(**{**vars(LAYERS), "name": name, "freeze_layers": 1, "freeze_steps": 4})
    whole, first, second = (make_engine(config, seed) for seed in (0, 0, 1))
    expected = walk(whole, range(6))[-1]
    walk(first, range(3))
    Checkpointer(tmp_path, 1).save(3, first, {})
    restore(tmp_path / "step-000000003", second)
    found = walk(second, range(3, 6))[-1]
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_moments_go_by_parameter_from_one_group_to_many(tmp_path: Path) -> None:
    """Groups number a network's parameters in another order."""
    one, many = make_engine(OptimConfig(name="adamw")), make_engine(OptimConfig(name="adamw", decay_all=False))
    walk(one, range(2))
    Checkpointer(tmp_path, 1).save(2, one, {})
    restore(tmp_path / "step-000000002", many)
    moments = one.optimizer_state()
    assert moments.keys() == many.optimizer_state().keys() and len(moments) == 8
    for key, parameter in many.bare.named_parameters():
        found = many.optimizer.optimizer.state[parameter]["exp_avg"]
        assert torch.equal(found, moments[key]["exp_avg"].gather()), key


class Plain(Backbone):
    """A body of the user's own that says nothing of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Stem.of(nn.Conv2d(3, 4, 3))
        self.arch, self.feature_dim = "my.bodies:plain", 4


@pytest.mark.parametrize(
    ("encoder", "settings", "words"),
    [
        (build_encoder("timm:test_vit"), {"freeze_layers": 6, "freeze_steps": 1}, "use up to 5"),
        (Plain(), {"layer_decay": 0.5}, r"'my.bodies:plain': its layers have no order \(group_matcher\)"),
    ],
)
def test_what_cannot_be_grouped_is_refused(encoder: Backbone, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        build_optimizer(OptimConfig(**settings), encoder, encoder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layer_decay": 1.5}, r"optim.layer_decay is 1.5: use more than 0, up to 1"),
        ({"ema": 1.0}, r"optim.ema is 1.0: use more than 0, below 1"),
        ({"freeze_layers": 2}, r"optim.freeze_steps is 0: optim.freeze_layers needs it"),
        ({"freeze_steps": 2}, r"optim.freeze_layers is 0: optim.freeze_steps needs it"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        OptimConfig(**settings)
