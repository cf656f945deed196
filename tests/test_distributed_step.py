"""The step's gradient on one, two and four real gloo processes, in double precision: equal to rounding."""

import copy
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from ca2cl.config import ObjectiveConfig
from ca2cl.model.encoder import build_encoder
from ca2cl.model.heads import Embeddings, Network
from ca2cl.objective.method import CA2CL, ViewBatch

BATCH = 16


class DoubleNetwork(Network):
    """Keeps double precision where ``Network`` promises fp32."""

    def forward(self, x: Tensor, stem_delta: Tensor | None = None, update_statistics: bool = True) -> Embeddings:
        original = Tensor.float
        Tensor.float = Tensor.double  # type: ignore[method-assign,assignment]
        try:
            return super().forward(x, stem_delta, update_statistics)
        finally:
            Tensor.float = original  # type: ignore[method-assign]


class PlainEngine:
    """The smallest engine: DistributedDataParallel's averaging by hand."""

    loss_scale = 1.0

    def __init__(self, network: Network) -> None:
        self.network = self.bare = network

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        if dist.is_initialized():
            for parameter in self.network.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= dist.get_world_size()


def one_step(network: Network, rank: int, world: int, objective: ObjectiveConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x1, x2 = (torch.randn(BATCH, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    mine = torch.arange(rank, BATCH, world)  # interleaved, as lanes are
    terms = CA2CL(objective).step(PlainEngine(network), [ViewBatch(x1[mine], x2[mine], mine)])
    grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    buffers = {name: b for name, b in network.named_buffers() if "running" in name}
    return {**{f"term {k}": v for k, v in terms.items()}, **grads, **buffers}


def work(rank: int, world: int, port: int, network: Network, objective: ObjectiveConfig, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    network = copy.deepcopy(network)  # spawned processes share the tensors that they are given
    result = one_step(network, rank, world, objective)
    if rank == 0:
        torch.save(result, out)
    dist.destroy_process_group()


WHOLE = ObjectiveConfig(clusters=3, mutual_information=0.3, epsilon=0.3)


@pytest.mark.parametrize(
    ("world", "norm", "objective"),
    [
        (2, "sync", WHOLE),
        (2, "frozen", WHOLE),
        (4, "sync", WHOLE),
        (4, "frozen", WHOLE),
        (2, "sync", ObjectiveConfig(cluster_weight=0.0, epsilon=0.3)),
        (2, "sync", ObjectiveConfig(clusters=3, adversary=False)),
    ],
)
def test_any_number_of_processes_gives_the_gradient_of_one(
    world: int, norm: Any, objective: ObjectiveConfig, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = DoubleNetwork(build_encoder("resnet18", norm)).double().train()
    expected = one_step(copy.deepcopy(network), 0, 1, objective)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "result.pt"
    mp.spawn(work, (world, port, network, objective, str(out)), nprocs=world)  # type: ignore[no-untyped-call]
    found = torch.load(out, weights_only=True)
    assert found.keys() == expected.keys()
    assert expected["term skipped_adversaries"] == 0
    assert ("term nt_xent_adversarial" in expected) == objective.adversary
    for name, value in expected.items():
        tolerance = 1e-6 if name.startswith("term") else 1e-9  # terms are reported in fp32
        error = (found[name] - value).norm() / value.norm().clamp(min=1e-12)
        assert float(error) < tolerance, (name, float(error))
