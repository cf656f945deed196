"""The step's gradient on one, two and four real gloo processes with one, two and four micro-batches, in double
precision: equal to rounding."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ca2cl.config import ObjectiveConfig, OptimConfig
from ca2cl.methods.base import LocalEngine, ViewBatch
from ca2cl.methods.bitwise import Bitwise
from ca2cl.methods.ca2cl.method import CA2CL
from ca2cl.methods.simclr import SimCLR, SimCLRNetwork
from ca2cl.models.backbone import build_encoder
from ca2cl.models.batch_norm import commit_statistics
from ca2cl.models.bn_groups import LaneGroups
from ca2cl.models.heads import Embeddings, EncoderNetwork, Network
from ca2cl.runtime.accelerator import build_accelerator
from ca2cl.training.engine import AccelerateEngine
from ca2cl.training.optim import build_optimizer
from tests.support import step_oracle
from tests.support.forked import on_ranks

BATCH = 16
GROUPS = LaneGroups(lanes=BATCH, batch_size=BATCH, group=2, groups=2)
GROUP = GROUPS.group
SLIDES = torch.arange(BATCH) ** 2 % 5 - 2  # 3, 6 or 7 tiles each


class Double(EncoderNetwork):
    """Keeps double precision where a network promises fp32."""

    def forward(
        self, x: Tensor, stem_delta: Tensor | None = None, slot: int | None = None, words_B: Tensor | None = None
    ) -> Any:
        original = Tensor.float
        Tensor.float = Tensor.double  # type: ignore[method-assign,assignment]
        try:
            return super().forward(x, stem_delta, slot, words_B)
        finally:
            Tensor.float = original  # type: ignore[method-assign]


class DoubleNetwork(Double, Network):
    pass


class DoubleSimCLR(Double, SimCLRNetwork):
    pass


class AveragingEngine(LocalEngine):
    """The smallest engine of several processes: what DistributedDataParallel does, by hand."""

    def backward(self, loss: Tensor) -> None:
        super().backward(loss * (dist.get_world_size() if dist.is_initialized() else 1))
        if dist.is_initialized():
            for parameter in self.network.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= dist.get_world_size()


def micro_batches(rank: int, world: int, count: int) -> list[ViewBatch]:
    """A rank's share of the batch, a tile a lane, as the stream and the feed would give it."""
    generator = torch.Generator().manual_seed(1)
    x1, x2 = (torch.randn(BATCH, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    mine = torch.arange(rank, BATCH, world)
    mine = mine[GROUPS.first_order(mine)]
    return [
        ViewBatch(x1[rows], x2[rows], rows, GROUPS.second_order(len(rows)), slides=SLIDES[rows])
        for rows in mine.split(len(mine) // count)
    ]


def one_step(
    network: Any, rank: int, world: int, count: int, objective: ObjectiveConfig, accumulation: Any = "exact"
) -> dict[str, Tensor]:
    kind = next(network.parameters()).dtype
    views = [v._replace(x1=v.x1.to(kind), x2=v.x2.to(kind)) for v in micro_batches(rank, world, count)]
    weight = objective.same_slide_weight
    method: Any = SimCLR(same_slide_weight=weight) if isinstance(network, SimCLRNetwork) else CA2CL(objective)
    if accumulation == "bitwise":
        method = Bitwise(method, GROUPS.block)
    terms = method.step(AveragingEngine(network), views)
    grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    buffers = {name: b for name, b in network.named_buffers() if "running" in name}
    return {**{f"term {k}": v for k, v in terms.items()}, **grads, **buffers}


def work(rank: int, world: int, network: Any, count: int, objective: ObjectiveConfig, kind: str, out: str) -> None:
    dist.init_process_group("gloo")
    network = copy.deepcopy(network)  # spawned processes share the tensors that they are given
    result = one_step(network, rank, world, count, objective, kind)
    if rank == 0:
        torch.save(result, out)
    dist.destroy_process_group()


def on_processes(
    world: int, network: Any, count: int, objective: ObjectiveConfig, folder: Path, kind: str = "exact"
) -> dict[str, Tensor]:
    """What rank 0 of so many gloo processes ends its step with."""
    out = folder / "result.pt"
    on_ranks(work, world, world, network, count, objective, kind, str(out))
    found: dict[str, Tensor] = torch.load(out, weights_only=True)
    return found


WHOLE = ObjectiveConfig(clusters=3, mutual_information=0.3, epsilon=0.3)


CLEAN = ObjectiveConfig(clusters=3, adversary=False)
ALONE = ObjectiveConfig(cluster_weight=0.0, epsilon=0.3)


def compare(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        # A new network's embeddings nearly coincide: the adversarial term feels the last bits.
        tolerance = 1e-6 if name.startswith("term") else 1e-9
        error = (found[name] - value).norm() / value.norm().clamp(min=1e-12)
        assert float(error) < tolerance, (name, float(error))


@pytest.mark.parametrize(
    ("world", "count", "norm", "objective"),
    [
        (2, 1, "sync", WHOLE),
        (4, 1, "sync", WHOLE),
        (2, 1, "sync", ALONE),
        (2, 1, "sync", CLEAN),
        (4, 1, "frozen", WHOLE),
        (2, 2, "frozen", WHOLE),
        (1, 2, "lane_group", WHOLE),
        (1, 4, "lane_group", WHOLE),
        (2, 1, "lane_group", WHOLE),
        (2, 2, "lane_group", WHOLE),
        (4, 1, "lane_group", WHOLE),
        (2, 2, "lane_group", ALONE),
        (2, 2, "lane_group", CLEAN),
    ],
)
def test_any_number_of_processes_and_micro_batches_gives_the_gradient_of_one(
    world: int, count: int, norm: Any, objective: ObjectiveConfig, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = DoubleNetwork(build_encoder("resnet18", norm, group=GROUP)).double().train()
    expected = one_step(copy.deepcopy(network), 0, 1, 1, objective)
    found = (
        one_step(network, 0, 1, count, objective)
        if world == 1
        else on_processes(world, network, count, objective, tmp_path)
    )
    assert found.keys() == expected.keys()
    assert expected["term skipped_adversaries"] == 0
    assert ("term nt_xent_adversarial" in expected) == objective.adversary
    compare(expected, found)


@pytest.mark.parametrize(
    ("world", "count"), [pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(1, 4, marks=pytest.mark.slow), (2, 2)]
)
@pytest.mark.parametrize("kind", ["exact", "bitwise"])
def test_simclr_is_as_exact(world: int, count: int, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = DoubleSimCLR(build_encoder("resnet18", "lane_group", group=GROUP), 16).double().train()
    expected = one_step(copy.deepcopy(network), 0, 1, 1, WHOLE)
    if world == 1:
        found = one_step(network, 0, 1, count, WHOLE, kind)
    else:
        found = on_processes(world, network, count, WHOLE, tmp_path, kind)
    assert found.keys() == expected.keys()
    compare(expected, found)


@pytest.mark.parametrize(
    ("norm", "world", "count"),
    [
        *itertools.product(["lane_group", "frozen"], [1], [2, 4]),
        *itertools.product(["lane_group", "frozen"], [2], [1, 2]),
        ("lane_group", 4, 1),
        *(pytest.param(norm, 4, 1, marks=pytest.mark.slow) for norm in ("frozen", "sync")),  # the others cover them
    ],
)
def test_bitwise_is_the_same_to_the_last_bit_in_single_precision(
    norm: Any, world: int, count: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = Network(build_encoder("resnet18", norm, group=GROUP)).train()
    expected = one_step(copy.deepcopy(network), 0, 1, 1, WHOLE, "bitwise")
    if world == 1:
        found = one_step(network, 0, 1, count, WHOLE, "bitwise")
    else:
        found = on_processes(world, network, count, WHOLE, tmp_path, "bitwise")
    assert found.keys() == expected.keys() and expected["term skipped_adversaries"] == 0
    for name, value in expected.items():
        if name.startswith("term"):  # added up in double precision, and reported so
            assert float(found[name]) == pytest.approx(float(value), rel=1e-14)
        else:
            assert torch.equal(found[name], value), name


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("world", "count", "mode"),
    [
        (1, 1, "absolute"),
        (1, 2, "relative"),
        (2, 2, "relative"),
        pytest.param(2, 1, "absolute", marks=slow),
        pytest.param(4, 1, "relative", marks=slow),
    ],
)
def test_a_vits_gradient_is_that_of_slow_loops(world: int, count: int, mode: Any, tmp_path: Path) -> None:
    """In double precision, of any number of processes and micro-batches."""
    torch.manual_seed(0)
    network = DoubleNetwork(build_encoder("timm:test_vit", image_size=32)).double().train()
    objective = ObjectiveConfig(clusters=3, epsilon=0.3, epsilon_mode=mode)
    (whole,) = micro_batches(0, 1, 1)
    canonical = torch.argsort(whole.positions)
    expected = step_oracle.gradients(network, whole.x1[canonical], whole.x2[canonical], objective)
    if world == 1:
        found = one_step(network, 0, 1, count, objective)
    else:
        found = on_processes(world, network, count, objective, tmp_path)
    assert found["term skipped_adversaries"] == 0
    compare(expected, found)


def test_a_body_without_batch_norm_is_exact_on_any_hardware(tmp_path: Path) -> None:
    """A ViT: its patch embedding has a bias, and its rows know nothing of one another under the default norm, sync."""
    torch.manual_seed(0)
    vit = build_encoder("timm:test_vit", image_size=32)
    network = DoubleNetwork(copy.deepcopy(vit)).double().train()
    expected = one_step(copy.deepcopy(network), 0, 1, 1, WHOLE)
    assert expected["term skipped_adversaries"] == 0 and "encoder.body.patch_embed.proj.bias" in expected
    compare(expected, on_processes(2, network, 2, WHOLE, tmp_path))
    single = Network(vit).train()
    expected = one_step(copy.deepcopy(single), 0, 1, 1, WHOLE, "bitwise")
    found = on_processes(2, single, 2, WHOLE, tmp_path, "bitwise")
    assert all(torch.equal(found[name], value) for name, value in expected.items() if not name.startswith("term"))


def test_bitwise_is_autocast_too() -> None:
    torch.manual_seed(0)
    network = Network(build_encoder("resnet18", "frozen", identity_blocks=True)).train()
    network.autocast_dtype = torch.bfloat16
    one, four = (one_step(copy.deepcopy(network), 0, 1, count, WHOLE, "bitwise") for count in (1, 4))
    network.autocast_dtype = None
    whole = one_step(network, 0, 1, 1, WHOLE)
    names = [name for name, _ in network.named_parameters()]
    assert all(torch.equal(one[name], four[name]) for name in names)
    ours, theirs = (torch.cat([grads[name].flatten() for name in names]) for grads in (one, whole))
    assert 1e-4 < float((ours - theirs).norm() / theirs.norm()) < 0.2


@pytest.mark.parametrize(
    ("norm", "count", "objective"),
    [
        ("frozen", 1, WHOLE),
        ("frozen", 2, WHOLE),
        ("frozen", 2, CLEAN),
        ("frozen", 1, ALONE),
        ("sync", 1, WHOLE),
    ],
)
def test_bitwise_is_exact(norm: Any, count: int, objective: ObjectiveConfig) -> None:
    torch.manual_seed(0)
    network = DoubleNetwork(build_encoder("resnet18", norm, group=GROUP)).double().train()
    expected = one_step(copy.deepcopy(network), 0, 1, 1, objective)
    found = one_step(network, 0, 1, count, objective, "bitwise")
    compare(expected, found)


@pytest.mark.parametrize(("count", "kind"), [(1, "exact"), (2, "exact"), (2, "bitwise")])
def test_only_the_clean_passes_move_running_statistics(count: int, kind: str) -> None:
    """A step with the adversary leaves those of a step without it: each view's, the strong one's first."""
    torch.manual_seed(0)
    network = DoubleNetwork(build_encoder("resnet18", "lane_group", group=GROUP)).double().train()
    found, clean = (one_step(copy.deepcopy(network), 0, 1, count, objective, kind) for objective in (WHOLE, CLEAN))
    (whole,) = micro_batches(0, 1, 1)
    first, second = (network.encoder.conv1(x) for x in (whole.x1, whole.x2))
    expected = torch.zeros(64, dtype=torch.float64)
    for view, rows in ((first, slice(None)), (second, whole.second_order)):
        groups = [group.mean((0, 2, 3)) for group in torch.split(view[rows], GROUP)]
        expected = 0.9 * expected + 0.1 * torch.stack(groups).mean(0)
    torch.testing.assert_close(found["encoder.bn1.running_mean"], expected.detach())
    buffers = [name for name in found if "running" in name]
    assert buffers
    for name in buffers:
        torch.testing.assert_close(found[name], clean[name])


def test_plain_accumulation_is_another_loss() -> None:
    """The tests above would pass if micro-batches were the whole batch to either kind."""
    torch.manual_seed(0)
    network = DoubleNetwork(build_encoder("resnet18", "frozen")).double().train()
    halves = micro_batches(0, 1, 2)
    losses = [
        float(CA2CL(CLEAN, kind).step(AveragingEngine(network), halves)["nt_xent"]) for kind in ("exact", "plain")
    ]
    assert abs(losses[0] - losses[1]) > 0.1


class Unlucky(DoubleNetwork):
    """Rank 1's gradient with respect to the perturbation is not a number; nothing else is touched."""

    def forward(
        self, x: Tensor, stem_delta: Tensor | None = None, slot: int | None = None, words_B: Tensor | None = None
    ) -> Embeddings:
        if stem_delta is not None and stem_delta.requires_grad and dist.is_initialized() and dist.get_rank() == 1:
            stem_delta = stem_delta.clone()
            stem_delta.register_hook(lambda grad: grad * float("nan"))
        return super().forward(x, stem_delta, slot)


@pytest.mark.parametrize("count", [1, 2])
def test_a_direction_that_is_not_finite_on_one_rank_is_skipped_on_all(count: int, tmp_path: Path) -> None:
    """The step is then L1's alone, on every rank, and says so."""
    torch.manual_seed(0)
    network = Unlucky(build_encoder("resnet18", "lane_group", group=GROUP)).double().train()
    clean = ObjectiveConfig(**{**vars(WHOLE), "adversary": False})
    expected = one_step(copy.deepcopy(network), 0, 1, 1, clean)
    found = on_processes(2, network, count, WHOLE, tmp_path)
    assert found["term skipped_adversaries"] == 1 and found["term nt_xent_adversarial"] == 0
    for name in (name for name in expected if not name.startswith("term")):
        error = (found[name] - expected[name]).norm() / expected[name].norm().clamp(min=1e-12)
        assert float(error) < 1e-9, (name, float(error))


def three_forwards(rank: int, norm: Any, out: str) -> None:
    torch.manual_seed(0)
    network = Network(build_encoder("resnet18", norm)).train()
    engine = AccelerateEngine(build_accelerator(), network, build_optimizer(OptimConfig(), network))
    for _ in range(2):  # the second step would meet what the first has spoilt
        statistics = engine.bare.encoder.bn1.running_mean
        statistics += rank  # what another rank's buffers would overwrite
        before = statistics.clone()
        views = [engine.network(torch.randn(4, 3, 32, 32), None, slot) for slot in (0, 1, None)]
        engine.backward(torch.stack([view.z.sum() + view.g.sum() for view in views]).sum())
        assert torch.equal(statistics, before)
        commit_statistics(engine.bare)
        norm, skipped = engine.optimizer_step(1e-3, None)
        assert norm > 0 and not skipped
    if rank == 0:
        torch.save({name: b for name, b in engine.bare.named_buffers() if name.endswith("tracked")}, out)
    engine.accelerator.end_training()


@pytest.mark.parametrize(("norm", "moves"), [("sync", 4), ("frozen", 0)])
def test_three_forwards_and_one_backward_through_the_wrapper(norm: str, moves: int, tmp_path: Path) -> None:
    """DistributedDataParallel would write BatchNorm's buffers between them, which a backward pass may need as they were
    (pytorch#175024; torch 2.14 on CPUs lets it pass)."""
    on_ranks(three_forwards, 2, norm, str(tmp_path / "out.pt"))
    counts = torch.load(tmp_path / "out.pt", weights_only=True)
    assert counts and all(int(count) == moves for count in counts.values())


def the_same_step_thrice(rank: int, out: str) -> None:
    torch.manual_seed(0)
    network = Network(build_encoder("resnet18", "frozen")).train()
    engine = AccelerateEngine(build_accelerator(), network, build_optimizer(OptimConfig(), network))
    (views,) = micro_batches(rank, 4, 1)
    views = views._replace(x1=views.x1.float(), x2=views.x2.float())
    found = []
    for _ in range(3):
        CA2CL(CLEAN).step(engine, [views])
        found.append({name: p.grad.clone() for name, p in engine.bare.named_parameters() if p.grad is not None})
        engine.optimizer.zero_grad(set_to_none=True)
    if rank == 0:
        torch.save(found, out)
    engine.accelerator.end_training()


def test_a_jobs_first_step_is_like_its_next_ones_to_the_last_bit(tmp_path: Path) -> None:
    """DistributedDataParallel sorts its buckets anew after the first backward pass, and gloo adds what lies elsewhere
    in a bucket in another order: on three processes or more a job that was stopped and goes on would be another one."""
    on_ranks(the_same_step_thrice, 4, str(tmp_path / "out.pt"))
    first, *others = torch.load(tmp_path / "out.pt", weights_only=True)
    assert first
    for grads in others:
        assert all(torch.equal(grads[name], value) for name, value in first.items())
