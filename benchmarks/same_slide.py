"""What a weight of same-slide negatives and a limit of tiles a slide do to an encoder.

    python -m benchmarks.same_slide GLAS FOLDER [--steps 150] [--seeds 1] [--size 48] [--only NAME ...]

GLAS has the training images of the GlaS data set as PNG, and ``index.csv`` with patient and grade. Tiles of 96 px are
cut from them side by side, and the patient is their slide. The first table says what is in a batch of 64 under each
limit of tiles a slide. Then SimCLR is trained with each setting for equal steps, and linear probes on the frozen
features say how well an encoder tells

- patients and images apart: trained on the left half of every image, scored on its right half;
- benign from malignant: five folds of whole patients.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ca2cl.data.loading.order import LaneOrder
from ca2cl.data.loading.slide_order import SlideOrder
from ca2cl.data.shards.config import ShardConfig
from ca2cl.data.shards.index import ShardIndex
from ca2cl.data.shards.run import run as run_shard
from ca2cl.models.preprocess import preprocess
from ca2cl.registry.resolve import resolve_encoder

SIDE = 96
SETTINGS: dict[str, tuple[str, ...]] = {
    "weight 1": (),
    "weight 0.25": ("--objective.same_slide_weight", "0.25"),
    "weight 0": ("--objective.same_slide_weight", "0"),
    "weight 1, at most 8": ("--data.max_per_slide", "8"),
    "weight 0, at most 8": ("--objective.same_slide_weight", "0", "--data.max_per_slide", "8"),
}
Array = npt.NDArray[np.generic]
_NAME = re.compile(r"(?P<image>\w+)-p(?P<patient>\d+)-x(?P<x>\d+)-y\d+-(?P<half>[lr])")


def cut(glas: Path, folder: Path) -> Path:
    """The tiles, as class folders of grades."""
    with (glas / "index.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    for row in rows:
        image = Image.open(glas / f"{row['name']}.png").convert("RGB")
        (folder / row["grade_glas"]).mkdir(parents=True, exist_ok=True)
        for x in range(0, image.width - SIDE + 1, SIDE):
            for y in range(0, image.height - SIDE + 1, SIDE):
                half = "l" if x + SIDE / 2 < image.width / 2 else "r"
                name = f"{row['name']}-p{row['patient_id']}-x{x}-y{y}-{half}.png"
                image.crop((x, y, x + SIDE, y + SIDE)).save(folder / row["grade_glas"] / name)
    return folder


def train(shards: Path, run: Path, options: argparse.Namespace, seed: int, setting: tuple[str, ...]) -> None:
    """One run, unless it is finished."""
    words = (
        "--recipe", "simclr", "--data.shards", shards, "--run.output_dir", run, "--data.image_size", options.size,
        "--data.lanes", 16, "--run.batch_size", 64, "--run.epochs", "null", "--run.steps", options.steps,
        "--run.seed", seed, "--run.figures_every", 0, "--tracking.register_as", "null",
        "--tracking.root", run.parent / "store", *setting,
    )  # fmt: skip
    subprocess.run([sys.executable, "-m", "ca2cl", "pretrain", *map(str, words)], check=True)


def probe(encoder: str, paths: list[Path], size: int) -> dict[str, float]:
    """Accuracies of linear probes of patient, image and grade (balanced), from tiles resized to ``size``."""
    found = resolve_encoder(encoder)
    card, parts = found.card, []
    with torch.inference_mode():
        for first in range(0, len(paths), 128):
            tiles = np.stack([np.asarray(Image.open(path)) for path in paths[first : first + 128]])
            x = preprocess(torch.from_numpy(tiles), size, card.mean, card.std)
            parts.append(found.encoder.eval()(x).numpy())
    values_ND = np.concatenate(parts)
    facts = [_NAME.match(path.stem) for path in paths]
    columns = {name: np.array([fact[name] if fact else "" for fact in facts]) for name in ("image", "patient", "half")}
    left = columns["half"] == "l"
    scores = {}
    for name in ("patient", "image"):
        model = _linear().fit(values_ND[left], columns[name][left])
        scores[name] = float(model.score(values_ND[~left], columns[name][~left]))
    grades = np.array([path.parent.name for path in paths])
    predicted = np.empty_like(grades)
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0).split(values_ND, grades, columns["patient"])
    for fit, held in folds:
        predicted[held] = _linear().fit(values_ND[fit], grades[fit]).predict(values_ND[held])
    scores["grade"] = float(balanced_accuracy_score(grades, predicted))
    return scores


def _linear() -> LogisticRegression:
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))


def composition(shards: Path, limit: int | None) -> str:
    """A row: what batches of two epochs have of the same slides."""
    index = ShardIndex(shards)
    order = LaneOrder(index, 16, 64, 0) if limit is None else SlideOrder(index, 16, 64, 0, limit)
    groups, counts = np.array(index.groups()), []
    for step in range(2 * order.steps_per_epoch):
        counts.append(np.unique(groups[order.batch(step).samples], return_counts=True)[1])
    alike = np.mean([(count * (count - 1)).sum() for count in counts]) / (64 * 63)
    waits = 1 - order.steps_per_epoch * 64 / len(index)
    return (
        f"| {limit or 'none'} | {np.mean([len(count) for count in counts]):.1f} | "
        f"{np.mean([count.max() for count in counts]):.1f} | {max(count.max() for count in counts)} | {alike:.3f} | "
        f"{order.steps_per_epoch} | {waits:.0%} |"
    )


def share(run: Path) -> float:
    """Mean of ``same_slide_negatives`` in a run's journal; NaN where it has none."""
    lines = (json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines())
    found = [line["same_slide_negatives"] for line in lines if "same_slide_negatives" in line]
    return float(np.mean(found)) if found else float("nan")


def main() -> None:
    """Train what is missing, and print a row for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("glas", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--size", type=int, default=48, help="side of the views in pixels")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=[*SETTINGS], metavar="NAME")
    options = parser.parse_args()
    tiles, shards = options.folder / "tiles", options.folder / "shards"
    if not shards.exists():
        run_shard(ShardConfig(source=str(cut(options.glas, tiles)), out=str(shards), group_pattern=r"-p(\d+)-"))
    paths = sorted(tiles.rglob("*.png"))
    print("| most tiles a slide | slides | largest, mean | largest | same-slide negatives | steps | tiles that wait |")
    print("| --- " * 7 + "|")
    for limit in (None, 64, 12, 8, 6, 5):
        print(composition(shards, limit))
    print("| setting | seed | same-slide negatives | patient | image | benign or malignant |\n" + "| --- " * 6 + "|")
    for seed in range(options.seeds):
        for name in options.only:
            run = options.folder / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
            if not (run / "encoder").exists():
                train(shards, run, options, seed, SETTINGS[name])
            found = probe(str(run), paths, options.size)
            print(
                f"| {name} | {seed} | {share(run):.3f} | {found['patient']:.3f} | {found['image']:.3f} | "
                f"{found['grade']:.3f} |", flush=True,
            )  # fmt: skip
    for seed in range(options.seeds):
        found = probe(f"random:{seed}", paths, options.size)
        print(f"| random weights | {seed} | | {found['patient']:.3f} | {found['image']:.3f} | {found['grade']:.3f} |")


if __name__ == "__main__":
    main()
