"""The watch: its numbers against slow loops from their definitions, its tiles, its state, and what it leaves behind."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ca2cl.config import RunConfig, ViewsConfig
from ca2cl.data.remote.reader import ShardReader
from ca2cl.data.shards.config import ShardConfig
from ca2cl.data.shards.index import ShardIndex
from ca2cl.data.shards.run import run as run_shard
from ca2cl.data.synthetic.tissue import CLASSES, write_tissue
from ca2cl.errors import InputError
from ca2cl.models.encoder_card import EncoderCard
from ca2cl.pretrain.watch import measures
from ca2cl.pretrain.watch.assemble import check
from ca2cl.pretrain.watch.best import BestEncoder
from ca2cl.pretrain.watch.collapse import collapse_of
from ca2cl.pretrain.watch.config import WatchConfig
from ca2cl.pretrain.watch.held_out import OwnTiles, _equal_share, choose, find_tiles
from ca2cl.pretrain.watch.passes import Passes, gather, untouched
from ca2cl.pretrain.watch.state import WatchState
from ca2cl.pretrain.watch.watch import metric_of, worth
from ca2cl.runtime.tensor_files import Whole
from ca2cl.training.checkpoint import BEST_NAME
from ca2cl.views.build import build_views
from tests.support.jobs import make_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("watch"), 5)


@pytest.fixture
def features() -> Tensor:
    """(60, 7), of one sign as a ResNet's."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(60, 7, generator=draw, dtype=torch.float64).relu() + 0.1


def test_effective_rank_is_that_of_the_singular_values(features: Tensor) -> None:
    for x in (features, features[:5]):
        singular = np.linalg.svd(x.numpy(), compute_uv=False)
        p = singular / singular.sum() + 1e-7
        assert measures.effective_rank(x) == pytest.approx(math.exp(-sum(v * math.log(v) for v in p)), rel=1e-9)
    assert measures.effective_rank(torch.eye(6, dtype=torch.float64)) == pytest.approx(6, rel=1e-5)
    assert measures.effective_rank(torch.ones(20, 6, dtype=torch.float64)) == pytest.approx(1, abs=1e-4)
    assert measures.effective_rank(torch.zeros(20, 6, dtype=torch.float64)) == 0


def test_uniformity_spread_and_distances_are_means_over_pairs(
    features: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "_ROWS", 17)  # several blocks
    unit = (features / features.norm(dim=1, keepdim=True)).numpy()
    pairs = [(unit[i] - unit[j]) @ (unit[i] - unit[j]) for i in range(60) for j in range(i)]
    expected = math.log(sum(math.exp(-2 * d) for d in pairs) / len(pairs))
    assert measures.uniformity(torch.from_numpy(unit)) == pytest.approx(expected, rel=1e-9)
    every = [(a - b) @ (a - b) for a in unit for b in unit]
    assert measures.spread(torch.from_numpy(unit)) == pytest.approx(np.mean(every) / 2, rel=1e-9)
    views = features.flip(0) * 3
    found = measures.squared_distances(features, views)
    assert found.numpy() == pytest.approx([(a - b) @ (a - b) for a, b in zip(unit, unit[::-1], strict=True)], abs=1e-12)


def test_neighbours_are_tiles_of_other_slides(features: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "_ROWS", 17)
    monkeypatch.setattr(measures, "NEIGHBOURS", 5)
    draw = np.random.default_rng(1)
    labels, slides = draw.integers(0, 3, 60), draw.integers(0, 8, 60)
    x = features.numpy() - features.numpy().mean(0)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    right: dict[int, list[bool]] = {}
    for i in range(60):
        others = sorted((j for j in range(60) if slides[j] != slides[i]), key=lambda j: -float(x[i] @ x[j]))[:5]
        votes = [sum(max(float(x[i] @ x[j]), 1e-9) for j in others if labels[j] == k) for k in range(3)]
        right.setdefault(int(labels[i]), []).append(int(np.argmax(votes)) == labels[i])
    expected = np.mean([np.mean(row) for row in right.values()])
    rows = measures.centred_rows(features)
    found = measures.neighbour_accuracy(rows, torch.from_numpy(labels), torch.from_numpy(slides))
    assert found == pytest.approx(expected)
    alone = measures.neighbour_accuracy(rows, torch.from_numpy(labels), torch.arange(60))
    assert alone != found


def test_the_linear_probe_is_ridge_regression_on_other_folds(features: Tensor) -> None:
    draw = np.random.default_rng(2)
    labels, folds = draw.integers(0, 3, 60), draw.integers(0, 4, 60)
    rows = measures.centred_rows(features).numpy()
    predicted = np.zeros(60, int)
    for fold in range(4):
        held = folds == fold
        targets = np.eye(3)[labels[~held]]
        # the same as least squares with a row sqrt(ridge) e_d of target 0 for every feature
        x = np.concatenate([rows[~held], np.eye(7) * measures.RIDGE**0.5])
        y = np.concatenate([targets - targets.mean(0), np.zeros((7, 3))])
        predicted[held] = (rows[held] @ np.linalg.lstsq(x, y, rcond=None)[0] + targets.mean(0)).argmax(1)
    expected = np.mean([(predicted == labels)[labels == k].mean() for k in range(3)])
    given = (torch.from_numpy(x) for x in (rows, labels, folds))
    assert measures.linear_accuracy(*given) == pytest.approx(expected)


def test_labelled_tiles_of_other_shards_vote_and_are_fitted(features: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "NEIGHBOURS", 5)
    labels, given = np.random.default_rng(4).integers(0, 3, 60), features.numpy()
    known, asked = given[:40] - given[:40].mean(0), given[40:] - given[:40].mean(0)
    known, asked = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (known, asked))
    votes = []
    for row in asked:
        nearest = sorted(range(40), key=lambda j, row=row: -float(row @ known[j]))[:5]
        votes.append([sum(max(float(row @ known[j]), 1e-9) for j in nearest if labels[j] == k) for k in range(3)])
    targets = np.eye(3)[labels[:40]]
    x, y = np.concatenate([known, np.eye(7)]), np.concatenate([targets - targets.mean(0), np.zeros((7, 3))])
    scores = asked @ np.linalg.lstsq(x, y, rcond=None)[0] + targets.mean(0)
    found = measures.accuracies_from(
        features[:40], torch.from_numpy(labels[:40]), features[40:], torch.from_numpy(labels[40:])
    )  # fmt: skip
    for accuracy, predicted in zip(found, (np.argmax(votes, 1), scores.argmax(1)), strict=True):
        right = [(predicted == labels[40:])[labels[40:] == k].mean() for k in range(3)]
        assert accuracy == pytest.approx(np.mean(right))


def test_centroids_that_hold_all_tiles_and_none() -> None:
    two = torch.cat([torch.tensor([[1.0, 0.0]]).repeat(30, 1), torch.tensor([[0.0, 1.0]]).repeat(10, 1)]).double()
    mixed = two[torch.randperm(40, generator=torch.Generator().manual_seed(3))]
    largest, smallest = measures.centroid_shares(mixed, 3, 10)
    assert largest == 0.75 and smallest == 0.0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x * torch.tensor([1.0] * 6 + [torch.inf]), " of 60 of 60 tiles are not finite"),
        (lambda x: x * 0, " are 0"),
        (lambda x: 1 + 1e-4 * x, "all tiles are alike"),
        (lambda x: x[:, :1] * torch.ones(7), "all tiles are alike"),
        (lambda x: (x[:, :1] - 0.5) * torch.ones(7), " have an effective rank of 1.00 of 7"),
        (lambda x: torch.eye(7)[0] + x[:, :1] * torch.eye(7)[1], "the differences of the "),
    ],
)
def test_a_collapse_is_named(features: Tensor, change: Any, reason: str) -> None:
    none = features[:, :0]
    assert collapse_of(features, features) == collapse_of(features, none) == ""
    for found in (collapse_of(change(features).double(), none), collapse_of(features, change(features).double())):
        assert reason in found, found


def test_the_tiles_are_balanced_and_the_same_for_any_number_of_ranks(shards: Path) -> None:
    tiles = choose(ShardIndex(shards), 40, seed=1)
    assert tiles.labels_N is not None and tiles.fold_N is not None
    assert np.bincount(tiles.labels_N).tolist() == [4] * 9 and not tiles.by_slide
    again, other = choose(ShardIndex(shards), 40, seed=1), choose(ShardIndex(shards), 40, seed=2)
    assert again.samples_N.tolist() == tiles.samples_N.tolist() != other.samples_N.tolist()
    assert (ShardIndex(shards).labels()[tiles.samples_N] == tiles.labels_N).all()
    for world in range(1, 5):
        dealt = [tiles.blocks(rank, world) for rank in range(world)]
        assert len({len(blocks) for blocks in dealt}) == 1
        assert sorted(np.concatenate([one for blocks in dealt for one in blocks])) == list(range(36))


def test_labels_of_both_shards_are_numbers_of_the_same_classes(shards: Path, tmp_path: Path) -> None:
    few = make_shards(tmp_path, 4, seed=1)
    found = find_tiles(WatchConfig(shards=str(shards), labelled=str(few), tiles=64), None, 60, ShardIndex(few))
    assert found is not None and found.reference is not None and found.labels_N is not None
    assert len(found) == 27 and len(found.reference) == 27 and found.index.classes == found.reference.index.classes


def test_training_tiles_vote_where_watched_ones_name_no_slides_and_have_their_classes(
    shards: Path, tmp_path: Path
) -> None:
    training = ShardIndex(make_shards(tmp_path, 4, seed=1))
    found = find_tiles(WatchConfig(shards=str(shards), tiles=64), None, 60, training)
    assert found is not None and found.reference is not None
    assert found.reference.index.manifest.digest == training.manifest.digest

    named, fewer = tmp_path / "named", tmp_path / "fewer"
    tissue = write_tissue(tmp_path / "tissue", 2, size=48, seed=2, slides=2)
    run_shard(ShardConfig(source=str(tissue), out=str(named), workers=1, group_pattern=r"(S\d+)-"))
    shutil.rmtree(tissue / CLASSES[0])
    run_shard(ShardConfig(source=str(tissue), out=str(fewer), workers=1))
    for watched, trained_on in ((named, training), (shards, ShardIndex(fewer))):
        alone = find_tiles(WatchConfig(shards=str(watched), tiles=64), None, 60, trained_on)
        assert alone is not None and alone.reference is None


def test_the_best_is_chosen_by_labels_where_there_are_some_and_else_by_the_lowest_uniformity(shards: Path) -> None:
    tiles = choose(ShardIndex(shards), 64, seed=0)
    assert metric_of(WatchConfig(), tiles) == "linear" and metric_of(WatchConfig(metric="knn"), tiles) == "knn"
    assert metric_of(WatchConfig(), replace(tiles, labels_N=None)) == "uniformity"
    for metric in ("linear", "rank"):
        assert worth(metric, {metric: 0.6}) > worth(metric, {metric: 0.5})
    assert worth("uniformity", {"uniformity": -1.4}) > worth("uniformity", {"uniformity": -1.3})


def test_a_rare_class_gives_all_it_has() -> None:
    for sizes, count in (([3, 50, 50], 63), ([600, 600], 100), ([1, 1], 64)):
        share = _equal_share(np.array(sizes), count)
        taken = [int(np.minimum(sizes, one).sum()) for one in (share, share + 1)]
        assert taken[0] <= count and (taken[1] > count or taken[1] == sum(sizes)), (sizes, share)


def test_features_do_not_depend_on_the_number_of_ranks(shards: Path) -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 5, 5, 4), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    method: Any = SimpleNamespace(encoder=lambda network: network, embeddings=lambda _, features: features[:, :2])
    tiles = choose(ShardIndex(shards), 100, seed=0)
    views = build_views(ViewsConfig(recipe="crop"), 32, mean=(0.5,) * 3, std=(0.2,) * 3, seed=0)
    passes = Passes(32, (0.5,) * 3, (0.2,) * 3, views, tiles.words_N)
    found = []
    for world in (1, 2, 3):
        own = [OwnTiles(tiles, ShardReader(shards), tiles.blocks(rank, world), 0) for rank in range(world)]
        for _ in range(2):  # read, then kept
            parts = [tuple(passes.share(method, encoder, one, torch.device("cpu"))) for one in own]
            ranks: Any = SimpleNamespace(share=lambda _, parts=parts: parts)
            found.append(gather(parts[0], ranks))  # type: ignore[arg-type]
    for one in found[1:]:
        assert (one.places == found[0].places).all() and torch.equal(one.features, found[0].features)
        assert torch.equal(one.embeddings, found[0].features[:, :2])
        assert torch.equal(one.distances, found[0].distances) and len(one.distances) == 45


def test_a_pass_leaves_modes_buffers_and_random_numbers(shards: Path) -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5))
    network[0].eval()  # a layer that is frozen
    network.register_buffer("count", torch.zeros(()))
    before = torch.get_rng_state()
    with pytest.raises(KeyError), untouched(network, torch.device("cpu")):
        assert not any(module.training for module in network.modules())
        network.count += torch.rand(())
        raise KeyError
    assert [module.training for module in network.modules()] == [True, False, True]
    assert network.count == 0 and torch.equal(torch.get_rng_state(), before)


def test_shards_that_cannot_be_watched_are_refused(shards: Path) -> None:
    index = ShardIndex(shards)
    other: Any = SimpleNamespace(manifest=SimpleNamespace(digest=""))
    with pytest.raises(InputError, match=r"these are the shards of data\.shards"):
        find_tiles(WatchConfig(shards=str(shards)), None, 60, index)
    assert find_tiles(WatchConfig(), None, 60, index) is None
    with pytest.raises(InputError, match=r"these are the shards of watch\.shards"):
        find_tiles(WatchConfig(shards=str(shards), labelled=str(shards)), None, 60, other)
    with pytest.raises(InputError, match=r"watch\.tiles is 3"):
        WatchConfig(tiles=3)


def test_parameters_that_are_shared_out_are_refused() -> None:
    settings: Any = SimpleNamespace(watch=WatchConfig(shards="x"), run=RunConfig(fsdp=True))
    with pytest.raises(InputError, match=r"run\.fsdp is true: a watch"):
        check(settings)
    check(SimpleNamespace(watch=WatchConfig(), run=RunConfig(fsdp=True)))  # type: ignore[arg-type]


def test_a_state_goes_on_with_the_same_tiles_and_metric_alone() -> None:
    state = WatchState("tiles knn", best_step=4, best_value=0.5, card={"step": 4}).after("flat").after("flat")
    assert state.collapsed == 2 and state.after("").collapsed == 0
    saved = {"watch": state.as_dict()}
    assert WatchState.of(saved, "tiles knn") == state
    assert WatchState.of(saved, "tiles rank") == WatchState("tiles rank")
    assert WatchState.of({"watch": {"best_step": -1}}, "x") == WatchState.of({}, "x") == WatchState("x")


def test_the_best_encoder_is_the_one_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was written since, or lost: a kill may come before the next checkpoint."""
    best = BestEncoder(tmp_path)

    def write(step: int) -> WatchState:
        card = EncoderCard(
            arch="resnet18", feature_dim=512, input_size=32, mean=(0.5,) * 3, std=(0.5,) * 3, step=step
        )  # fmt: skip
        kept = best.write({"x": Whole.of(torch.full((2,), float(step)))}, card)
        return WatchState("x", best_step=step, card=kept)

    state = write(3)
    checkpoint = tmp_path / "step-000000005"
    checkpoint.mkdir()
    (checkpoint / BEST_NAME).write_bytes(best.weights.read_bytes())
    wanted = [(path.name, path.read_bytes()) for path in sorted(best.folder.iterdir())]
    write(7)
    for _ in range(2):
        best.restore(state, checkpoint)
        assert [(path.name, path.read_bytes()) for path in sorted(best.folder.iterdir())] == wanted
        best.weights.unlink()
    best.restore(WatchState("x"), checkpoint)
    assert not best.folder.exists()
