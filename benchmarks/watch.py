"""The watch of ``ca2cl pretrain``: its cost, what its numbers are worth, and what it calls a collapse.

    python -m benchmarks.watch cost --train SHARDS --held-out SHARDS
    python -m benchmarks.watch correlation --run RUN --train SHARDS --held-out SHARDS
    python -m benchmarks.watch collapse --train SHARDS --held-out SHARDS --runs 5
    python -m benchmarks.watch healthy --train SHARDS --held-out SHARDS --runs 20

``cost`` trains ``crc5_small``'s step (ResNet-18, 96 px, 64 tiles, no adversary) for a few steps, and prints the CPU
seconds of a step and of a watch of 2,000 tiles. ``correlation`` takes the checkpoints of a run: the watch's numbers on
the held-out tiles, and a linear probe that is fitted on all labels of ``--train``; watched and probed tiles are the
same ones first, and then different halves. The labelled tiles of the watch are drawn from ``--train``. ``collapse``
trains without negatives at a hundred times the rate, ``healthy`` as it should be, with other seeds and settings each
time.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from ca2cl.cli import main as ca2cl
from ca2cl.data.loading.sequential import iterate_tiles
from ca2cl.data.remote.reader import ShardReader
from ca2cl.data.shards.index import ShardIndex
from ca2cl.evaluation.probe.classifiers import logistic_regression
from ca2cl.evaluation.splits import labelled_subset
from ca2cl.methods.gather import Rows
from ca2cl.methods.simclr import Projected, SimCLR
from ca2cl.models.encoder_io import make_encoder
from ca2cl.models.preprocess import preprocess
from ca2cl.pretrain import run as pretrain
from ca2cl.pretrain.watch.held_out import WatchedTiles, choose
from ca2cl.pretrain.watch.measures import accuracies_from
from ca2cl.pretrain.watch.passes import Share
from ca2cl.pretrain.watch.watch import Centroids, Watch, measure
from ca2cl.runtime.tensor_files import reading_tensors
from ca2cl.tracking.journal import watch_lines
from ca2cl.training.engine import AccelerateEngine

STEP = (
    "--recipe", "smoke", "--data.image_size", "96", "--data.lanes", "64", "--run.batch_size", "64",
    "--objective.adversary", "false", "--optim.name", "adamw", "--optim.lr", "1e-3", "--run.figures_every", "0",
    "--tracking.register_as", "null",
)  # fmt: skip
EVERY, TILES = 200, 2000
SHORT = (
    "--recipe", "smoke", "--run.batch_size", "16", "--objective.clusters", "5", "--run.figures_every", "0",
    "--tracking.register_as", "null", "--watch.tiles", "100",
)  # fmt: skip
VOTED = ("knn of labelled", "linear of labelled")
NAMES = (*VOTED, "knn", "linear", "rank", "uniformity")


def say(*words: object) -> None:
    """A line of the result."""
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


@contextmanager
def clocked(owner: Any, name: str) -> Iterator[list[tuple[float, float]]]:
    """CPU seconds of this process before and after each call of a method."""
    inner, seen = getattr(owner, name), list[tuple[float, float]]()

    def outer(*arguments: Any, **named: Any) -> Any:
        before = time.process_time()
        result = inner(*arguments, **named)
        seen.append((before, time.process_time()))
        return result

    setattr(owner, name, outer)
    try:
        yield seen
    finally:
        setattr(owner, name, inner)


def cost(options: argparse.Namespace) -> None:
    """CPU seconds of a step and of a watch, in one process."""
    with (
        tempfile.TemporaryDirectory() as folder,
        clocked(Watch, "look") as looks,
        clocked(AccelerateEngine, "optimizer_step") as steps,
    ):
        where = ("--run.output_dir", f"{folder}/run", "--tracking.root", f"{folder}/store")
        job = ("--run.steps", "6", "--run.checkpoint_every", "100", "--data.shards", options.train)
        watch = ("--watch.shards", options.held_out, "--watch.every", "3", "--watch.tiles", str(TILES))
        assert ca2cl(["pretrain", *STEP, *where, *job, *watch]) == 0
    gaps = [b[1] - a[1] for a, b in zip(steps, steps[1:], strict=False)]
    watched = {number for number, (_, end) in enumerate(steps) for before, _ in looks if end <= before < end + 1}
    step = statistics.median(gap for number, gap in enumerate(gaps) if number > 0 and number not in watched)
    costs = [after - before for before, after in looks]
    say(f"a step {step:.2f} CPU s; watches of {TILES} tiles", ", ".join(f"{one:.2f}" for one in costs), "CPU s")
    say(f"share of the time at one in {EVERY} steps: {costs[-1] / (EVERY * step + costs[-1]):.2%}")


def features(path: Path, root: str, cache: Path) -> tuple[Tensor, np.ndarray[Any, Any]]:
    """Features (N, D) and labels (N,) of all tiles, by the ResNet-18 of a checkpoint at 96 px."""
    index = ShardIndex(root)
    kept = cache / f"{path.name}-{index.manifest.digest[:8]}.npz"
    if not kept.exists():
        with reading_tensors(path / "model.safetensors") as parts:
            state = {k.removeprefix("encoder."): v.read() for k, v in parts.items() if k.startswith("encoder.")}
        encoder, rows, labels = make_encoder(state, "resnet18", str(path), 96), [], []
        with torch.inference_mode():
            for tiles, own, _ in iterate_tiles(index, ShardReader(root), np.arange(len(index)), batch_size=64):
                rows.append(encoder(preprocess(tiles, 96, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))))
                labels.append(own)
        np.savez(kept, x=torch.cat(rows).numpy(), y=torch.cat(labels).numpy())
    held = np.load(kept)
    return torch.from_numpy(held["x"]), held["y"]


def correlation(options: argparse.Namespace) -> None:
    """Spearman's rank correlation of the watch's numbers with a linear probe, over a run's checkpoints."""
    options.cache.mkdir(parents=True, exist_ok=True)
    tiles = choose(ShardIndex(options.held_out), TILES, 0)
    found = sorted(Path(options.run, "checkpoints").glob("step-*"))
    found = [path for path in found if not options.steps or int(path.name.removeprefix("step-")) in options.steps]
    table = {path.name: _row(path, options, tiles) for path in found}
    for name, row in table.items():
        say(name, json.dumps({key: round(statistics.mean(values), 4) for key, values in row.items()}))
    for one in NAMES:
        for watched, probed in (("all", "all"), ("a", "b"), ("b", "a")):
            probes = [row[f"probe {probed}"][0] for row in table.values()]
            draws = zip(*(row[f"{one} {watched}"] for row in table.values()), strict=True)
            values = [float(spearmanr(values, probes).statistic) for values in draws]
            said = f"Spearman, {one} of {watched} with the probe of {probed}, {len(table)} checkpoints:"
            spread = f" ± {statistics.stdev(values):.3f} over {len(values)} draws" if len(values) > 1 else ""
            say(said, f"{statistics.mean(values):.3f}{spread}")


def _row(path: Path, options: argparse.Namespace, tiles: WatchedTiles) -> dict[str, list[float]]:
    """Numbers of a checkpoint, one for each draw of the tiles that vote; those that no draw changes once."""
    train_x, train_y = features(path, options.train, options.cache)
    test_x, test_y = features(path, options.held_out, options.cache)
    prediction = logistic_regression(train_x.numpy(), train_y, test_x.numpy(), seed=0, strength=options.strength)
    right = prediction.probabilities.argmax(1)[tiles.samples_N] == test_y[tiles.samples_N]
    half = np.arange(len(tiles)) < len(tiles) // 2  # the order of the watch is random
    row: dict[str, list[float]] = {}
    for name, places in {"all": np.arange(len(tiles)), "a": np.flatnonzero(half), "b": np.flatnonzero(~half)}.items():
        some = tiles.only(places)
        values = test_x[torch.from_numpy(some.samples_N)]
        numbers, _ = measure(_share(values), some, Centroids(10, 10))
        row |= {f"{one} {name}": [numbers[one]] for one in NAMES if one in numbers}
        row[f"probe {name}"] = [float(right[places].mean())]
        assert some.labels_N is not None
        own = torch.from_numpy(some.labels_N)
        for draw in range(options.draws):
            voting = labelled_subset(train_y, options.labelled, draw)
            x, y = train_x[torch.from_numpy(voting)].double(), torch.from_numpy(train_y[voting])
            for one, value in zip(VOTED, accuracies_from(x, y, values.double(), own), strict=True):
                row.setdefault(f"{one} {name}", []).append(value)
    return row


def _share(features_ND: Tensor) -> Share:
    """Without embeddings and views."""
    return Share(np.arange(len(features_ND)), features_ND, features_ND[:, :0], torch.zeros(1))


class WithoutNegatives(SimCLR):
    """The mean cosine of two views, and nothing against a constant: it collapses. For one process."""

    def terms(self, first: Projected, second: Projected, rows: Rows) -> dict[str, Tensor]:
        """As ``TwoViewMethod.terms``."""
        return {"loss": -(first.z * second.z).sum(1).mean() / self.temperature}


def looks(options: argparse.Namespace, *settings: str) -> list[dict[str, Any]]:
    """The watch lines of a short run."""
    with tempfile.TemporaryDirectory() as folder:
        where = (
            "--run.output_dir",
            f"{folder}/run",
            "--tracking.root",
            str(Path(tempfile.gettempdir(), "watch-store")),
        )
        data = ("--data.shards", options.train, "--watch.shards", options.held_out)
        with patch.object(pretrain, "hand_on"):  # figures and files of encoders, which nobody looks at
            assert ca2cl(["pretrain", *SHORT, *where, *data, *settings]) == 0
        return list(watch_lines(Path(folder, "run", "journal.jsonl")))


def told(lines: Sequence[dict[str, Any]]) -> str:
    """Rank, and distance of two embeddings, of each watch, and the collapses."""
    rows = [f"{line['step']}: {line['watch/rank'] or math.nan:.1f} {line['watch/apart'] or 0:.4f}" for line in lines]
    named = [f"{line['step']}: {line['collapse']}" for line in lines if line.get("collapse")]
    return f"{', '.join(rows)}; collapses: {'; '.join(named) or 'none'}"


def collapse(options: argparse.Namespace) -> None:
    """Runs without negatives at a hundred times the rate, and which of their watches see it."""
    method = ("--method.name", "benchmarks.watch:WithoutNegatives", "--run.steps", "12", "--watch.every", "2")
    for seed in range(options.runs):
        for name, rate in (("sgd", "5"), ("adamw", "0.1")):
            lines = looks(options, *method, "--optim.name", name, "--optim.lr", rate, "--run.seed", str(seed))
            say(f"seed {seed}, {name}, rate {rate}: {told(lines)}")


def healthy(options: argparse.Namespace) -> None:
    """Runs with negatives at ordinary rates, and whether a watch calls one collapsed."""
    varied = (
        ("--method.name", "simclr"),
        ("--optim.name", "adamw", "--optim.lr", "1e-3"),
        ("--model.norm", "lane_group", "--model.norm_group", "4", "--model.norm_block", "2", "--optim.lr", "0.2"),
        ("--views.recipe", "ca2cl", "--objective.adversary", "false"),
        ("--model.arch", "timm:vit_tiny_patch16_224", "--optim.name", "adamw", "--optim.lr", "5e-4"),
    )
    named = 0
    for number in range(options.seed, options.seed + options.runs):
        settings = varied[number % len(varied)]
        lines = looks(options, *settings, "--run.steps", "6", "--watch.every", "2", "--run.seed", str(number))
        named += any(line.get("collapse") for line in lines)
        say(f"seed {number}, {' '.join(settings)}: {told(lines)}")
    say(f"{named} of {options.runs} healthy runs had a watch that found a collapse")


PARTS = {"cost": cost, "correlation": correlation, "collapse": collapse, "healthy": healthy}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the four."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(PARTS))
    parser.add_argument("--train", required=True)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--runs", type=int, default=20, help="of collapse and healthy")
    parser.add_argument("--seed", type=int, default=0, help="the first of healthy's")
    parser.add_argument("--run", help="of correlation")
    parser.add_argument("--steps", type=int, nargs="*", help="of the checkpoints that are taken; default: all")
    parser.add_argument("--labelled", type=int, default=200, help="labelled tiles of each class that the watch has")
    parser.add_argument("--draws", type=int, default=1, help="of these tiles")
    parser.add_argument("--strength", type=float, default=1.0, help="C of the linear probe; ca2cl probe has 1 here")
    parser.add_argument("--cache", type=Path, default=Path("watch-features"), help="folder for features")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    PARTS[options.what](options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
