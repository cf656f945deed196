"""What runs on a GPU, on a GPU that there need not be: every tensor of an operation lies on one device, and nothing
waits for a number. (Kernels and their results need a real one.)"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from ca2cl.config import IMAGENET_MEAN, IMAGENET_STD, ObjectiveConfig, OptimConfig, ViewsConfig
from ca2cl.data.loading.stream import TileBatch
from ca2cl.evaluation.embed.config import EmbedConfig
from ca2cl.evaluation.embed.job import EmbedJob
from ca2cl.evaluation.features import extract, frozen
from ca2cl.evaluation.finetune.step import FineTuning, Preprocessing
from ca2cl.evaluation.labelled import LabelledBatch
from ca2cl.methods.bitwise import Bitwise
from ca2cl.methods.ca2cl.method import CA2CL
from ca2cl.models.backbone import build_encoder
from ca2cl.models.bn_groups import LaneGroups
from ca2cl.models.classifier import Classifier
from ca2cl.models.heads import Network
from ca2cl.models.preprocess import preprocess
from ca2cl.pretrain.batches import MicroBatches, maker
from ca2cl.runtime.accelerator import build_accelerator
from ca2cl.training.engine import AccelerateEngine
from ca2cl.training.optim import build_optimizer
from ca2cl.training.readings import Reading
from ca2cl.views.build import Views, build_views
from tests.support.fake_gpu import fake_cuda, strict_meta

SIDE = 32
COUNT = 16
RECIPES = ["ca2cl", "crop"]


def _views(recipe: str, size: int = SIDE) -> Views:
    config = ViewsConfig(recipe=recipe)  # type: ignore[arg-type]
    return build_views(config, size, mean=IMAGENET_MEAN, std=IMAGENET_STD, seed=0)


def _keys() -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (COUNT,), generator=torch.Generator().manual_seed(0))


def _engine(
    network: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch, optim: OptimConfig | None = None
) -> AccelerateEngine:
    accelerator = build_accelerator()
    monkeypatch.setattr(Accelerator, "device", property(lambda _: device))
    accelerator.device_placement = False  # a fake parameter cannot be moved twice
    optimizer = build_optimizer(optim or OptimConfig(), network, network.encoder, fused=True)
    return AccelerateEngine(accelerator, network, optimizer)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("side", "size"), [(72, 32), (32, 32), (30, 40)])
def test_views_are_made_where_the_tiles_lie(recipe: str, side: int, size: int) -> None:
    for tiles, made in _on_both(side, lambda tiles: _views(recipe, size)(tiles, _keys(), 0)):
        assert all(view.device == tiles.device and view.shape == (COUNT, 3, size, size) for view in made)


@pytest.mark.parametrize("side", [72, 32])
def test_tiles_are_preprocessed_where_they_lie(side: int) -> None:
    for tiles, made in _on_both(side, lambda tiles: preprocess(tiles, SIDE, IMAGENET_MEAN, IMAGENET_STD)):
        assert made.device == tiles.device and made.shape == (COUNT, 3, SIDE, SIDE)


def _on_both(side: int, make: Callable[[Tensor], Any]) -> list[tuple[Tensor, Any]]:
    found = []
    for place in (fake_cuda, strict_meta):
        with place() as gpu:
            tiles = torch.empty((COUNT, side, side, 3), dtype=torch.uint8, device=gpu)
            found.append((tiles, make(tiles)))
    return found


@pytest.mark.parametrize(
    ("recipe", "norm", "accumulation", "parts"),
    [
        ("ca2cl", "sync", "exact", 1),
        ("crop", "lane_group", "exact", 2),
        ("crop", "frozen", "exact", 2),
        ("crop", "sync", "plain", 2),
        ("crop", "sync", "bitwise", 1),
    ],
)
def test_a_training_step_runs_where_the_engine_is(
    recipe: str,
    norm: Literal["sync", "frozen", "lane_group"],
    accumulation: Literal["exact", "plain", "bitwise"],
    parts: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups = LaneGroups(8, COUNT, 2, 4)
    tiles = torch.zeros(COUNT, SIDE, SIDE, 3, dtype=torch.uint8)
    rows = torch.arange(COUNT)
    batch = TileBatch(0, 0, tiles, _keys(), rows, rows, rows, [str(row) for row in rows], [])
    with strict_meta() as gpu:
        engine = _engine(Network(build_encoder("resnet18", norm, group=2)).train(), gpu, monkeypatch)
        micro_batches = MicroBatches(
            batch, lambda tiles: method.views(tiles, _views(recipe)), gpu, COUNT // parts, groups
        )
        plain = CA2CL(ObjectiveConfig(clusters=4, lloyd_iterations=2), "plain" if accumulation == "plain" else "exact")
        method = Bitwise(plain, groups.block) if accumulation == "bitwise" else plain
        micro_batches = MicroBatches(
            batch, lambda tiles: plain.views(tiles, _views(recipe)), gpu, COUNT // parts, groups
        )
        engine.keep_buffers()
        terms = method.step(engine, micro_batches)
        assert {"nt_xent", "cluster", "nt_xent_adversarial"} < set(terms)
        assert {term.device for term in terms.values()} == {gpu}
        assert all(p.grad is not None and p.grad.device == gpu for p in engine.bare.parameters())
        reading = Reading(terms, engine.optimizer_step(1e-3, 1.0, terms["loss"]), {})
    found, _, skipped = reading.read()
    assert set(found) == set(terms) and not skipped


@pytest.mark.parametrize("accumulation", ["exact", "bitwise"])
def test_a_step_that_continues_given_weights_runs_where_the_engine_is(
    accumulation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drop path, recomputed blocks, groups of parameters, and a moving average that skips what the device skips."""
    groups, views = LaneGroups(8, COUNT, 2, 4), _views("crop")
    tiles, rows = torch.zeros(COUNT, SIDE, SIDE, 3, dtype=torch.uint8), torch.arange(COUNT)
    batch = TileBatch(0, 0, tiles, _keys(), rows, rows, rows, [str(row) for row in rows], [])
    plain = CA2CL(ObjectiveConfig(clusters=4, lloyd_iterations=2, same_slide_weight=0.0))
    method = Bitwise(plain, groups.block) if accumulation == "bitwise" else plain
    optim = OptimConfig(name="adamw", layer_decay=0.8, decay_all=False, freeze_layers=1, freeze_steps=2)
    with strict_meta() as gpu:
        encoder = build_encoder("timm:test_vit", image_size=SIDE, drop_path=0.3)
        encoder.set_grad_checkpointing()
        engine = _engine(Network(encoder).train(), gpu, monkeypatch, optim)
        engine.keep_average(0.9)
        micro_batches = MicroBatches(batch, maker(plain, views, words=True), gpu, COUNT // 2, groups)
        assert micro_batches[0].words.device == gpu
        engine.keep_buffers()
        terms = method.step(engine, micro_batches)
        assert {"same_slide_negatives", "anchors_without_negatives"} < set(terms)
        assert all(p.grad is not None and p.grad.device == gpu for p in engine.bare.parameters())
        outcome = engine.optimizer_step(1e-3, 1.0, terms["loss"], 0)
        engine.average(outcome)
        assert {whole.gather().device for whole in engine.average_state().values()} == {gpu}


def test_features_are_extracted_on_the_device() -> None:
    tiles, rows = torch.zeros(4, SIDE, SIDE, 3, dtype=torch.uint8), torch.arange(4)
    with strict_meta() as gpu:
        extractor = frozen(build_encoder().to(gpu), 48, IMAGENET_MEAN, IMAGENET_STD)
        found = extract([(tiles, rows, rows)], {"encoder": extractor}, total=4, device=gpu, title="tiles")
    assert found.values["encoder"].shape == (4, 512) and len(set(found.pixels_N)) == 1


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_embed_encodes_on_the_device(precision: Literal["no", "bf16"], tmp_path: Path) -> None:
    config = EmbedConfig(encoder="random", source=str(tmp_path), out=str(tmp_path / "out.parquet"), precision=precision)
    prepare = Preprocessing(48, IMAGENET_MEAN, IMAGENET_STD)
    with strict_meta() as gpu:
        found: Any = SimpleNamespace(encoder=build_encoder().eval().to(gpu), uri="random")
        parts: Any = SimpleNamespace(grid=None)
        job = EmbedJob(config, found, cast(Any, None), parts, gpu, prepare)
        resized = {2: prepare(torch.zeros(1, 60, 50, 3, dtype=torch.uint8))[0].numpy()}
        numbers = job.encode(torch.zeros(4, SIDE, SIDE, 3, dtype=torch.uint8), resized)
    assert numbers.vectors.shape == (4, 512)


@pytest.mark.parametrize(("augment", "norm"), [("crop", "sync"), ("ca2cl", "frozen"), ("none", "sync")])
def test_fine_tuning_steps_on_the_device(
    augment: str, norm: Literal["sync", "frozen"], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = Preprocessing(SIDE, IMAGENET_MEAN, IMAGENET_STD)
    make = _views(augment).weak if augment != "none" else lambda tiles, words, epoch: prepare(tiles)
    with strict_meta() as gpu:
        engine = _engine(Classifier(build_encoder("resnet18", norm), 3).train(), gpu, monkeypatch)
        tiles, labels = torch.zeros(COUNT, 72, 72, 3, dtype=torch.uint8).to(gpu), torch.zeros(COUNT).long().to(gpu)
        batches = [LabelledBatch(tiles, labels, _keys(), 0, 2 * COUNT)] * 2
        terms = FineTuning(make).step(engine, batches)
        assert {term.device for term in terms.values()} == {gpu}
        assert all(p.grad is not None and p.grad.device == gpu for p in engine.bare.parameters())


@pytest.mark.parametrize("place", [fake_cuda, strict_meta])
def test_a_mixture_of_devices_and_a_look_at_a_number_are_found(
    place: Callable[[], AbstractContextManager[torch.device]],
) -> None:
    with place() as gpu:
        there = torch.ones(2, 3).to(gpu)
        with pytest.raises(RuntimeError, match="same device"):
            torch.mm(there, torch.ones(3, 3))
        with pytest.raises(RuntimeError, match=r"_local_scalar_dense|item\(\)"):
            float(there.sum())
        assert not there.cpu().any()
