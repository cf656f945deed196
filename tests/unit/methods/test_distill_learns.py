"""A distilled student's neighbours are of its class more often than at its random start."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ca2cl.evaluation.probe.classifiers import nearest_neighbours
from ca2cl.methods.base import LocalEngine, MethodSettings
from ca2cl.methods.distill.method import DistillBatch
from ca2cl.methods.registry import build_method
from ca2cl.models.backbone import Backbone
from ca2cl.models.perturbed_conv import Stem
from ca2cl.pretrain.teacher import LiveTeacher

SIDE, CLASSES = 24, 4
NORMALISATION = ((0.5,) * 3, (0.5,) * 3)


class Body(Backbone):
    """Two convolutions and a mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.arch, self.feature_dim = "body", width
        self.stem = Stem.of(nn.Conv2d(3, 16, 5, stride=2, padding=2))
        self.second = nn.Conv2d(16, width, 3, stride=2, padding=1)

    def forward(self, x_BCHW: Tensor, stem_delta: Tensor | None = None) -> Tensor:
        return self.second(self.stem(x_BCHW, stem_delta).relu()).relu().mean((2, 3))


def stripes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Normalised tiles of stripes in four directions, of any colours and phase, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    angles = labels * torch.pi / CLASSES
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    phase = 2 * torch.pi * torch.rand(count, 1, 1, generator=generator)
    wave = torch.sin(x * angles.cos()[:, None, None] * 1.5 + y * angles.sin()[:, None, None] * 1.5 + phase)
    colours = torch.rand(2, count, 3, 1, 1, generator=generator) * 2 - 1
    tiles = torch.where(wave[:, None] > 0, colours[0], colours[1])
    return tiles + 0.3 * torch.randn(tiles.shape, generator=generator), labels


def knn_accuracy(encoder: nn.Module) -> float:
    """Of tiles that nothing was trained on, with as many others as references."""
    (train, train_labels), (test, test_labels) = stripes(200, 1), stripes(200, 2)
    with torch.no_grad():
        found = nearest_neighbours(encoder(train).numpy(), train_labels.numpy(), encoder(test).numpy(), k=20)
    return float(np.mean(found.probabilities.argmax(1) == test_labels.numpy()))


def supervised(encoder: Body, tiles: Tensor, labels: Tensor) -> None:
    """Train a teacher with labels, which the student does not see."""
    head = nn.Linear(encoder.feature_dim, CLASSES)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=3e-3)
    for rows in torch.randperm(len(tiles)).repeat(12).split(64):
        F.cross_entropy(head(encoder(tiles[rows])), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_student_learns_its_teachers_neighbours() -> None:
    torch.manual_seed(0)
    tiles, labels = stripes(512, 0)
    teacher, student = Body(48), Body(16)
    supervised(teacher, tiles, labels)
    method = build_method("distill", MethodSettings(), ["relational_weight=1", "temperature=0.1"])
    method.take_teacher(LiveTeacher(teacher.eval().requires_grad_(False), 48, SIDE, NORMALISATION, NORMALISATION))
    network = method.build(student).train()
    before, best = knn_accuracy(student), knn_accuracy(teacher)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    losses = []
    for rows in torch.randperm(len(tiles)).repeat(12).split(64):
        batch = DistillBatch(tiles[rows], torch.arange(len(rows)), None)
        losses.append(float(method.step(LocalEngine(network), [batch])["loss"]))
        optimizer.step()
        optimizer.zero_grad()
    after = knn_accuracy(student)
    assert best > 0.9 and before < 0.7, (before, best)
    assert after > before + 0.5 * (best - before), (before, after, best)
    assert losses[-1] < 0.5 * losses[0]
