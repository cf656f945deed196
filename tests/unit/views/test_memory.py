"""Views lie in memory of earlier views, but never while one of those is in use."""

from __future__ import annotations

import gc

import pytest
import torch

from ca2cl.config import IMAGENET_MEAN, IMAGENET_STD, ViewsConfig
from ca2cl.views.batch import Views
from ca2cl.views.build import build_views


@pytest.fixture
def views() -> Views:
    return build_views(ViewsConfig(recipe="crop"), 16, mean=IMAGENET_MEAN, std=IMAGENET_STD, seed=0)


def tiles(count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 24, 24, 3), dtype=torch.uint8, generator=generator), torch.arange(count)


def test_a_view_is_never_written_to_while_it_is_in_use(views: Views) -> None:
    held: list[tuple[int, torch.Tensor]] = []
    for epoch in range(30):
        strong, weak = views(*tiles(), epoch)
        held.append((epoch, weak[1:, 0] if epoch % 2 else strong.detach()[:1]))
        del strong, weak
        if len(held) > 4:
            del held[epoch % 3]
    fresh = build_views(ViewsConfig(recipe="crop"), 16, mean=IMAGENET_MEAN, std=IMAGENET_STD, seed=0)
    for epoch, part in held:
        strong, weak = fresh(*tiles(), epoch)
        assert torch.equal(part, weak[1:, 0] if epoch % 2 else strong[:1]), epoch


def test_a_graph_keeps_the_view_that_its_backward_pass_needs(views: Views) -> None:
    strong, _ = views(*tiles(), 0)
    weight, wanted = torch.ones(3, 3, 1, 1, requires_grad=True), strong.sum((0, 2, 3)).clone()
    loss = torch.nn.functional.conv2d(strong, weight).sum()
    del strong
    for epoch in range(1, 5):
        views(*tiles(), epoch)
    loss.backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[0, :, 0, 0], wanted)


def test_memory_is_used_again_and_not_kept_for_other_sizes(views: Views) -> None:
    places = set()
    for epoch in range(9):
        strong, weak = views(*tiles(), epoch)
        places.add(min(strong.data_ptr(), weak.data_ptr()))
        del strong, weak
    assert len(places) == 1 and len(views._spares._free) == 1
    views(*tiles(2), 0)
    gc.collect()
    assert [len(one) for one in views._spares._free] == [2 * 2 * 16 * 16 * 3 * 4]
