"""Linear probe by SGD on frozen features.

The authors train theirs on augmented tiles with BatchNorm in train mode: ``ca2cl finetune --trains head
--protocol original``.

Legend: N labelled tiles, F of them trained on, M test tiles, D features, K classes. Labels are 0..K-1 and every class
has a labelled tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ca2cl.config import OptimConfig
from ca2cl.evaluation.calibration.temperature import fit_temperature
from ca2cl.evaluation.features import FloatArray, mean_of, scaled
from ca2cl.evaluation.labelled import LabelledOrder, hold_out
from ca2cl.evaluation.linear_head import LinearHead
from ca2cl.evaluation.probe.classifiers import IntArray, Prediction
from ca2cl.evaluation.protocol import Protocol
from ca2cl.training.optim import build_optimizer
from ca2cl.training.schedule import learning_rate

Judge = Callable[[nn.Linear, int], float]
"""Score of the layer after epoch number e; the highest is the best."""


@dataclass(frozen=True)
class SgdRecipe:
    """Settings of the layer's training.

    The rate was chosen on held-out *training* tiles of crc5 (3,000 tiles, five classes) and unlike features: an
    encoder's, a random encoder's, a colour histogram's (``python -m benchmarks.probe_settings``). Mean accuracy is .597
    at a rate of .3, .615 at 1, .625 at 3 and .628 at 10; batches of 64 add .003 at four times the steps.
    """

    optim: OptimConfig = OptimConfig(name="sgd", lr=3.0, schedule="cosine_restarts")
    """SGD with momentum .9 and a cosine that starts again every 5 epochs."""
    epochs: int = 50
    """Passes over the tiles that are trained on, in whole turns of the cosine."""
    min_steps: int = 200
    """Steps at least, in more passes where few tiles are labelled."""
    batch_size: int = 256
    held_out: float = 0.2
    """Share of the labelled tiles that chooses the epoch."""


RECIPE = SgdRecipe()


def sgd_classifier(
    train_ND: FloatArray,
    labels_N: IntArray,
    test_MD: FloatArray,
    test_labels_M: IntArray,
    *,
    seed: int,
    protocol: Protocol,
    groups: Sequence[str | None] | None = None,
    recipe: SgdRecipe = RECIPE,
) -> Prediction:
    """A linear layer by SGD on features less the mean of the tiles trained on, scaled to unit length.

    Features are prepared as for ``logistic_regression``, so that the two differ by how they are fitted and by nothing
    else; and one rate then fits encoders whose features differ by orders of magnitude. The layer starts at zero, and
    its weights are those of the epoch that predicts the held-out labelled tiles with the lowest log-loss.

    Args:
        test_labels_M: used under ``protocol.selects_on_test`` alone, where the epoch is the one with the highest
            accuracy on the test tiles.
        seed: of the order of the tiles, and of which are held out.
        protocol: whether labelled tiles are held out; where none are, or a class has too few, and test tiles do not
            choose, the last epoch is taken. The held-out tiles also choose the temperature.
        groups: slide or patient of every labelled tile: whole ones are held out then.
    """
    held_N, _ = hold_out(labels_N, groups, recipe.held_out if protocol.holds_out else 0.0, seed)
    mean_D = mean_of(train_ND[~held_N])
    sets = train_ND[~held_N], train_ND[held_N], test_MD
    fit_FD, held_HD, test = (torch.from_numpy(scaled(features, mean_D)) for features in sets)
    labels_F, labels_H = torch.from_numpy(labels_N[~held_N]), torch.from_numpy(labels_N[held_N])
    labels_M = torch.from_numpy(test_labels_M)

    def judge(layer: nn.Linear, epoch: int) -> float:
        if protocol.selects_on_test:
            return float((layer(test).argmax(dim=1) == labels_M).sum())
        if len(labels_H):  # by likelihood and not by accuracy, which a few tiles cannot tell apart
            return -float(functional.cross_entropy(layer(held_HD), labels_H))
        return float(epoch)

    layer, epoch = _train(fit_FD, labels_F, int(labels_N.max()) + 1, judge, seed, recipe)
    with torch.inference_mode():
        probabilities_MK, probabilities_HK = (layer(x).double().softmax(dim=1).numpy() for x in (test, held_HD))
    head = LinearHead(layer.weight.detach().numpy(), layer.bias.detach().numpy(), mean_D)
    temperature = fit_temperature(labels_N[held_N], probabilities_HK) if held_N.any() else None
    setting = {"epoch": float(epoch + 1), "held_out": float(held_N.sum())}
    return Prediction(probabilities_MK, setting, head, temperature)


def _train(
    fit_FD: Tensor, labels_F: Tensor, classes: int, judge: Judge, seed: int, recipe: SgdRecipe
) -> tuple[nn.Linear, int]:
    """The layer after the epoch that ``judge`` liked best, the first of equals, and that epoch's number from 0."""
    layer = nn.Linear(fit_FD.shape[1], classes)
    nn.init.zeros_(layer.weight)  # the loss is convex: no random start is needed
    nn.init.zeros_(layer.bias)
    optimizer = build_optimizer(recipe.optim, layer)
    order = LabelledOrder(np.arange(len(labels_F), dtype=np.int64), recipe.batch_size, seed)
    epochs = _epochs(order.steps_per_epoch, recipe)
    best, best_epoch, kept = -float("inf"), -1, layer.state_dict()
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe.optim, epoch, epochs, 1)
        rows_F = torch.from_numpy(order.permuted(epoch))
        for batch in torch.split(rows_F, order.size)[: order.steps_per_epoch]:
            optimizer.zero_grad()
            torch.autograd.backward(functional.cross_entropy(layer(fit_FD[batch]), labels_F[batch]))
            optimizer.step()
        with torch.inference_mode():
            worth = judge(layer, epoch)
        if worth > best:
            best, best_epoch = worth, epoch
            kept = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.load_state_dict(kept)
    return layer, best_epoch


def _epochs(steps_per_epoch: int, recipe: SgdRecipe) -> int:
    """Passes in whole turns of the cosine, so that the last epoch is one of small steps."""
    turn = recipe.optim.restart_epochs
    return -(-max(recipe.epochs, -(-recipe.min_steps // steps_per_epoch)) // turn) * turn
