"""Score a detector on a split: COCO AP and GlaS metrics.

Legend: W processes of the job.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm

from ca2cl.data.decode import BadSample, decode
from ca2cl.detection.coco.files import align_categories, instance_ids, read_coco
from ca2cl.detection.coco.metrics import coco_scores
from ca2cl.detection.coco.segmentations import Json
from ca2cl.detection.engines.base import CocoSplit, Detector, Pixels
from ca2cl.detection.engines.predictions import coco_results, label_mask
from ca2cl.detection.scores.glas_metrics import ImageScores, compare, pooled
from ca2cl.errors import LocalError

CHALLENGE = ("f1", "dice", "hausdorff")


@dataclass(frozen=True)
class SplitScores:
    """What a detector scores on one split."""

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
    hidden = None if accelerator.is_main_process else True
    with tqdm(total=len(mine), desc=title, unit="image", disable=hidden, leave=False) as bar:
        for place, image, detections in zip(places, mine, detector.predict(read_images(split, mine)), strict=True):
            challenge = None
            if detections.masks_N is not None:
                size = image["height"], image["width"]
                predicted_HW = label_mask(detections, *size, min_score=min_score)
                challenge = compare(instance_ids(image, truth["annotations"]), predicted_HW)
            found.append((place, coco_results(image["id"], detections, categories), challenge))
            bar.update()
    everything = gather_object(found) if accelerator.num_processes > 1 else found
    if not accelerator.is_main_process:
        return None
    everything.sort(key=lambda one: one[0])
    results = [row for _, rows, _ in everything for row in rows]
    scores = coco_scores(truth, results)
    images = [challenge for _, _, challenge in everything if challenge is not None]
    if not images:  # of a detector without masks that found nothing, COCO cannot tell
        scores = {name: value for name, value in scores.items() if not name.startswith("mask/")}
    else:
        together = asdict(pooled(images))
        scores |= {name: float(together[name]) for name in CHALLENGE}
    return SplitScores(scores, results)


def read_images(split: CocoSplit, images: Iterable[Json]) -> Iterator[Pixels]:
    """The pixels of some of a split's images.

    Raises:
        LocalError: one cannot be read, or has another size than its file says.
    """
    for image in images:
        path = split.path(image)
        try:
            yield decode(path.read_bytes(), expect=(image["height"], image["width"]))
        except (OSError, BadSample) as error:
            told = getattr(error, "strerror", None) or error
            raise LocalError(f"{path}: {told}; make the folder again with `ca2cl detect prepare`") from None
