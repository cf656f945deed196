"""``Views``, ``nt_xent`` and ``cluster_loss``."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import ca2cl
from tests.support.shards import random_tiles

ROWS = 12


def slow_nt_xent(one: Tensor, two: Tensor, temperature: float) -> float:
    """Equation 1 of SimCLR, by loops."""
    rows = [row / row.norm() for row in torch.cat([one, two]).double()]
    total = 0.0
    for i, row in enumerate(rows):
        positive = (i + len(one)) % len(rows)
        others = [math.exp(float(row @ other) / temperature) for k, other in enumerate(rows) if k != i]
        total -= math.log(math.exp(float(row @ rows[positive]) / temperature) / sum(others))
    return total / len(rows)


def slow_cluster_loss(one: Tensor, two: Tensor, clusters: int, temperature: float, iterations: int) -> float:
    """Each view classified by the other's k-means, by loops."""
    views = [[(row / row.norm()).double().numpy() for row in view] for view in (one, two)]
    found = []
    for rows in views:
        centres = [row.copy() for row in rows[:clusters]]
        for _ in range(iterations):
            nearest = [min(range(clusters), key=lambda k: float(((row - centres[k]) ** 2).sum())) for row in rows]
            for k in range(clusters):
                members = [row for row, at in zip(rows, nearest, strict=True) if at == k]
                centres[k] = np.mean(members, axis=0) if members else centres[k]
        found.append((centres, nearest))
    total = 0.0
    for rows, (centres, nearest) in zip(views, reversed(found), strict=True):
        for row, at in zip(rows, nearest, strict=True):
            full = [k for k in range(clusters) if k in nearest]
            total -= math.log(
                math.exp(float(row @ centres[at]) / temperature)
                / sum(math.exp(float(row @ centres[k]) / temperature) for k in full)
            )
    return total / (2 * len(one))


def embeddings() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    one = torch.randn(ROWS, 5)
    return one, one + 0.3 * torch.randn(ROWS, 5)


def test_the_losses_are_those_of_the_loops() -> None:
    one, two = embeddings()
    assert float(ca2cl.nt_xent(one, two, 0.3)) == pytest.approx(slow_nt_xent(one, two, 0.3), rel=1e-6)
    loss = float(ca2cl.cluster_loss(one, two, clusters=3, temperature=0.3, iterations=4))
    assert loss == pytest.approx(slow_cluster_loss(one, two, 3, 0.3, 4), rel=1e-5)


def test_the_gradients_are_those_of_the_losses() -> None:
    pair = tuple(rows.double().requires_grad_() for rows in embeddings())
    assert torch.autograd.gradcheck(lambda one, two: ca2cl.nt_xent(one, two, 0.5), pair)
    assert torch.autograd.gradcheck(lambda one, two: ca2cl.cluster_loss(one, two, 3, 0.5), pair)


def _loss(network: torch.nn.Module, one: Tensor, two: Tensor) -> Tensor:
    both = network(torch.cat([one, two])).chunk(2)
    return ca2cl.nt_xent(*both) + ca2cl.cluster_loss(*both, clusters=3)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(1)
    network = DistributedDataParallel(torch.nn.Linear(5, 4).double())
    one, two = (rows.double().chunk(2)[rank] for rows in embeddings())
    loss = _loss(network, one, two)
    loss.backward()
    value = loss.detach()
    dist.all_reduce(value)
    torch.save((value / 2, network.module.weight.grad), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_under_ddp_give_the_gradient_of_one(tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = torch.nn.Linear(5, 4).double()
    loss = _loss(network, *(rows.double() for rows in embeddings()))
    loss.backward()
    mp.start_processes(_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    for rank in range(2):
        value, gradient = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(gradient, network.weight.grad)
        torch.testing.assert_close(value, loss.detach())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: ca2cl.nt_xent(z, z[:3]), "give two of shape"),
        (lambda z: ca2cl.nt_xent(z[:1], z[:1]), "give at least 2"),
        (lambda z: ca2cl.nt_xent(z, z, 0.0), "temperature is 0.0"),
        (lambda z: ca2cl.cluster_loss(z, z, 13), "give at least 13"),
    ],
)
def test_bad_rows_are_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(embeddings()[0])  # type: ignore[operator]


def test_views_follow_from_seed_epoch_and_key() -> None:
    tiles = torch.from_numpy(random_tiles(4, 40))
    views = ca2cl.Views("crop", 32, seed=5)
    keys = ["a", "b", "c", "d"]
    strong, weak = views(tiles, keys, epoch=1)
    assert strong.shape == weak.shape == (4, 3, 32, 32) and strong.dtype == torch.float32
    again = ca2cl.Views("crop", 32, seed=5)(tiles[[2, 0]], ["c", "a"], epoch=1)
    assert torch.equal(again[0], strong[[2, 0]]) and torch.equal(again[1], weak[[2, 0]])
    assert not torch.equal(views(tiles, keys, epoch=2)[0], strong)
    assert views.pixels(tiles, keys)[0].dtype == torch.uint8
    with pytest.raises(ValueError, match="4 tiles and 1 key hashes"):
        views(tiles, ["a"])
    with pytest.raises(ValueError, match=r"views\.strength"):
        ca2cl.Views(strength=-1)
