"""Fine-tuning's step and prediction (``training.loop.Method``).

Legend: B tiles of a batch, K classes, M tiles of a set that is predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ca2cl.common.console.progress import ProgressBar
from ca2cl.config import ViewsConfig
from ca2cl.data.loading.sequential import iterate_tiles
from ca2cl.data.remote.reader import ShardReader
from ca2cl.data.shards.index import ShardIndex
from ca2cl.evaluation.finetune.config import Augmentation
from ca2cl.evaluation.labelled import IGNORED, LabelledBatch
from ca2cl.models.batch_norm import commit_statistics
from ca2cl.models.preprocess import preprocess
from ca2cl.training.engine import AccelerateEngine
from ca2cl.training.loop import Method
from ca2cl.views.build import Views, build_views
from ca2cl.views.paper import STRONG, PaperRecipe

Integers = npt.NDArray[np.int64]


class FineTuning(Method):
    """Cross-entropy of labelled tiles, averaged over the global batch.

    Args:
        augment: uint8 tiles (B, H, W, 3), a word a tile (B,) and the epoch → the encoder's input.
    """

    def __init__(self, augment: Any) -> None:
        self.augment = augment

    def step(self, engine: AccelerateEngine, micro_batches: Sequence[LabelledBatch]) -> dict[str, Tensor]:
        """Accumulate the gradient; the loss, and the share of tiles that were right before the step."""
        sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
        for number, batch in enumerate(micro_batches):
            with engine.micro_step(last=number == len(micro_batches) - 1):
                logits_BK = engine.network(self.augment(batch.tiles, batch.words, batch.epoch))
                loss = F.cross_entropy(logits_BK, batch.labels, reduction="sum", ignore_index=IGNORED) / batch.total
                engine.backward(loss)
            right = (logits_BK.argmax(1) == batch.labels).sum() / batch.total
            sums += torch.stack([loss.detach().double(), right.double()])
        commit_statistics(engine.bare)
        loss, accuracy = engine.accelerator.reduce(sums, reduction="sum")
        return {"loss": loss, "accuracy": accuracy}


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of tiles outside training."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, tiles_BHWC: Tensor) -> Tensor:
        return preprocess(tiles_BHWC, self.size, self.mean, self.std)


def build_augmentation(name: Augmentation, prepare: Preprocessing, seed: int) -> Any:
    """Augmentation of labelled tiles: uint8 tiles (B, H, W, 3), a word a tile (B,) and the epoch → the encoder's
    input. ``strong`` is the paper's strong view with distortion as likely as in the authors' evaluation."""
    assert name != "auto", "not settled"
    if name == "none":
        return lambda tiles, words, epoch: prepare(tiles)
    how: dict[str, Any] = {"mean": prepare.mean, "std": prepare.std, "seed": seed}
    if name == "strong":
        recipe = PaperRecipe(prepare.size, strong=replace(STRONG, distortion=0.7))
        return Views(recipe, **how).strong
    return build_views(ViewsConfig(recipe=name), prepare.size, **how).weak


@dataclass(frozen=True)
class LabelledSet:
    """Labelled samples of some shards: their numbers in index order, and where their bytes are."""

    index: ShardIndex
    reader: ShardReader
    samples: Integers
    title: str


@torch.no_grad()
def predict(
    engine: AccelerateEngine, tiles: LabelledSet, prepare: Preprocessing, *, batch_size: int, workers: int
) -> tuple[npt.NDArray[np.float32], Integers, Integers]:
    """Class probabilities (M, K), labels and sample numbers (M,) of the tiles that decode, in index order; each rank
    sees every W-th tile, and all ranks get everything. Every rank calls it.

    Args:
        engine: holds the classifier.
        tiles: what to predict.
        prepare: pixels to the classifier's input.
        batch_size: tiles at a time.
        workers: decoding processes.
    """
    accelerator, network = engine.accelerator, engine.bare
    mine = tiles.samples[accelerator.process_index :: accelerator.num_processes]
    training = network.training
    network.eval()
    found: list[tuple[Any, Any, Any]] = []
    hidden = not accelerator.is_main_process
    with ProgressBar(total=len(mine), desc=tiles.title, unit="tile", disable=hidden, leave=False) as bar:
        for x, labels, samples in iterate_tiles(
            tiles.index, tiles.reader, mine, batch_size=batch_size, workers=workers, on_bad=lambda tile: None
        ):
            logits_BK = network(prepare(x.to(engine.device)))
            found.append((logits_BK.softmax(1).float().cpu().numpy(), labels.numpy(), samples.numpy()))
            bar.update(len(labels))
    network.train(training)
    everything = engine.gather_list(found)
    probabilities, labels_M, samples_M = (np.concatenate(part) for part in zip(*everything, strict=True))
    order = np.argsort(samples_M)
    return probabilities[order], labels_M[order], samples_M[order]
