"""Score a detector on a split: COCO AP and GlaS metrics.

Legend: W processes of the job.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ca2cl.common.console.progress import ProgressBar
from ca2cl.detection.coco.files import align_categories, instance_ids, read_coco
from ca2cl.detection.coco.metrics import coco_scores
from ca2cl.detection.coco.segmentations import Json
from ca2cl.detection.engines.base import CocoSplit, Detector
from ca2cl.detection.engines.predictions import coco_results, label_mask
from ca2cl.detection.scores.glas_metrics import ImageScores, compare, pooled

CHALLENGE = ("f1", "dice", "hausdorff")


@dataclass(frozen=True)
class SplitScores:
    """Scores and detections of one split."""

    scores: dict[str, float]
    """``box/AP`` and so on as ``coco_scores`` names them, and ``f1``, ``dice`` and ``hausdorff`` (pixels) of the masks,
    where there are any."""
    results: list[Json]
    """COCO's rows, in the order of the images."""


def score_split(
    detector: Detector, split: CocoSplit, title: str, *, min_score: float, accelerator: Any
) -> SplitScores | None:
    """Predict every image of a split, rank by rank every W-th, and score them; None on ranks other than 0. Every rank
    calls it.

    Args:
        detector: a trained one.
        split: images and annotations.
        title: for the progress bar.
        min_score: smallest score that counts for the GlaS metrics.
        accelerator: accelerate's, of all ranks.

    Raises:
        InputError: nothing is annotated, the file is damaged, or has other classes than the detector.
        LocalError: an image cannot be read.
    """
    from accelerate.utils import gather_object

    truth = align_categories(read_coco(split.annotations), detector.classes, split.annotations)
    categories = [category["id"] for category in truth["categories"]]
    places = range(accelerator.process_index, len(truth["images"]), accelerator.num_processes)
    mine = [truth["images"][place] for place in places]
    found: list[tuple[int, list[Json], ImageScores | None]] = []
    hidden = not accelerator.is_main_process
    shown = ProgressBar(places, desc=title, unit="image", disable=hidden, leave=False)
    for place, image, detections in zip(shown, mine, detector.predict(map(split.read, mine)), strict=True):
        challenge = None
        if detections.masks_N is not None:
            predicted_HW = label_mask(detections, image["height"], image["width"], min_score=min_score)
            challenge = compare(instance_ids(image, truth["annotations"]), predicted_HW)
        found.append((place, coco_results(image["id"], detections, categories), challenge))
    everything = gather_object(found) if accelerator.num_processes > 1 else found
    if not accelerator.is_main_process:
        return None
    everything.sort(key=lambda one: one[0])
    results = [row for _, rows, _ in everything for row in rows]
    challenges = [challenge for _, _, challenge in everything if challenge is not None]
    return SplitScores(score_results(truth, results, challenges), results)


def score_results(
    truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], challenges: Sequence[ImageScores]
) -> dict[str, float]:
    """COCO's scores of ``results``, and the GlaS challenge's of their masks.

    Args:
        truth: content of the COCO file.
        results: COCO's rows.
        challenges: what ``compare`` found in every image; none from a detector without masks.
    """
    scores = coco_scores(truth, results)
    if not challenges:  # where nothing was found, COCO cannot tell whether the detector has masks
        return {name: value for name, value in scores.items() if not name.startswith("mask/")}
    together = asdict(pooled(challenges))
    return scores | {name: float(together[name]) for name in CHALLENGE}
