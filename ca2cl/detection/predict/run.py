"""``ca2cl detect predict``: COCO results, label masks, overlays and scores."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image as PILImage

from ca2cl import __version__
from ca2cl.common.console.progress import ProgressBar
from ca2cl.common.console.summary import closing
from ca2cl.common.files import fresh_folder, write_atomic, writing
from ca2cl.common.records import parse_json
from ca2cl.common.scratch import scratch_folder
from ca2cl.common.tables import aligned
from ca2cl.config import TrackingConfig
from ca2cl.data.decode import BadSample, Pixels, decode
from ca2cl.data.orientation import orientation_of, refuse_turned
from ca2cl.data.sources.image_folder import EXTENSIONS
from ca2cl.detection.coco.files import align_categories, instance_ids, read_coco
from ca2cl.detection.coco.instances import Ids
from ca2cl.detection.coco.segmentations import Json, mask_tools
from ca2cl.detection.engines.base import Detector
from ca2cl.detection.engines.checkpoint import CARD
from ca2cl.detection.engines.predictions import Detections, coco_results, label_mask
from ca2cl.detection.engines.registry import load_detector
from ca2cl.detection.predict.config import PredictConfig
from ca2cl.detection.prepare.layouts import by_name, images_in
from ca2cl.detection.scores.glas_metrics import ImageScores, compare
from ca2cl.detection.scores.plots import draw_overlay
from ca2cl.detection.scores.scoring import score_results
from ca2cl.detection.train.report import RESULTS
from ca2cl.detection.train.trial import CELLS, DETECTOR, FIRST
from ca2cl.errors import InputError
from ca2cl.runtime.device import find_device
from ca2cl.store.names import WORD, full_run_id, is_stored

logger = logging.getLogger(__name__)
PREDICTIONS = "predictions.json"
_REMEDY = "free space or give another folder and run again, nothing was kept"


def run(config: PredictConfig) -> int:
    """Write OUT and print a summary. Returns the exit code.

    Raises:
        InputError: no detector, no image or a bad one, truth of other images, OUT taken or not writable.
    """
    mask_tools()
    paths = _images(Path(config.images).expanduser())
    truth = _truth(config.truth, paths) if config.truth else None
    out = Path(config.out).expanduser()
    detector = _load(config)
    if truth is not None:
        truth = align_categories(truth, detector.classes, config.truth)
    data = _empty(detector, config, truth)
    challenge: list[ImageScores] = []
    turned = 0
    with writing(out, _REMEDY), fresh_folder(out) as folder:
        for path in ProgressBar(paths, unit="image", desc="predict"):
            pixels_HWC, orientation = _read(path)
            if truth is not None:
                refuse_turned(path, orientation)
            turned += orientation != 1
            (found,) = detector.predict([pixels_HWC])
            image = _add(data, path, pixels_HWC, found, truth)
            predicted_HW = _write(folder, path, pixels_HWC, found, config)
            if truth is not None and predicted_HW is not None:
                challenge.append(compare(instance_ids(image, truth["annotations"]), predicted_HW))
        if truth is not None:
            data["info"]["scores"] = score_results(truth, data["annotations"], challenge)
        write_atomic(folder / PREDICTIONS, json.dumps(data, ensure_ascii=False).encode(), _REMEDY)
    if turned:
        logger.warning("%d images say that they are to be shown turned (EXIF orientation); taken as stored", turned)
    kept = sum(row["score"] >= config.min_score for row in data["annotations"])
    sys.stdout.write(f"{len(paths)} images, {kept} instances of score {config.min_score} or more, in {out}\n")
    if truth is not None:
        rows = [[name, f"{value:.4f}"] for name, value in data["info"]["scores"].items()]
        sys.stdout.write("\n" + aligned(["score", "value"], rows))
    sys.stdout.write(closing(f"predictions on {len(paths)} images", out, f"{PREDICTIONS} is in the format of COCO"))
    return 0


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"images is {str(folder)!r}: no folder there")
    found = images_in(folder)
    if not found:
        raise InputError(f"images is {str(folder)!r}: no image in it; give files of {' '.join(sorted(EXTENSIONS))}")
    by_name(found)  # masks and overlays have these names, so two images of one name are refused
    return found


def _truth(path: str, images: Sequence[Path]) -> Json:
    truth = read_coco(Path(path).expanduser(), warn=True)
    for image in truth["images"]:  # they may lie in another folder than where they were annotated
        image["file_name"] = image["file_name"].replace("\\", "/").rpartition("/")[2]
    listed = {image["file_name"] for image in truth["images"]}
    if len(listed) < len(truth["images"]):
        raise InputError(f"truth is {path!r}: two of its images differ in their folders only; split the file by folder")
    here = {image.name for image in images}
    if listed != here:
        name = min(listed ^ here)
        where = "the images" if name in listed else "it"
        raise InputError(f"truth is {path!r}: {name} is not in {where}; give the COCO file of these very images")
    return truth


def _load(config: PredictConfig) -> Detector:
    device, named = str(find_device(config.device)), config.detector
    path = Path(named).expanduser()
    if path.exists() or not (is_stored(named) or WORD.fullmatch(named)):
        return load_detector(_of_job(path), device)
    with scratch_folder() as scratch:
        return load_detector(_downloaded(named, scratch, config.tracking), device)


def _of_job(path: Path) -> Path:
    """A detector's folder; the first training's where ``path`` is a job's or a training's."""
    folders = (path, path / DETECTOR, path / CELLS / FIRST.name / DETECTOR)
    return next((folder for folder in folders if (folder / CARD).exists()), path)


def _downloaded(named: str, scratch: Path, tracking: TrackingConfig) -> Path:
    from ca2cl.registry.versions import needed_store
    from ca2cl.store.artifacts import fetch, names_in, run_place
    from ca2cl.store.open import fetch_run

    store = needed_store(tracking)
    run_id = full_run_id(store, named)
    if run_id is None:
        raise InputError(
            f"detector {named!r}: no folder, and no run in {store.public_uri} begins like that; give the id or folder "
            "that `ca2cl detect` printed"
        )
    fetch_run(store, run_id)
    listed = names_in(store, run_place(store, run_id))
    if RESULTS in listed:
        run_id = _first_training(fetch(store, run_place(store, run_id, RESULTS), scratch))
    elif DETECTOR not in listed:
        raise InputError(f"run {run_id!r}: has no detector; give a run of `ca2cl detect` that has finished")
    return fetch(store, run_place(store, run_id, DETECTOR), scratch)


def _first_training(results: Path) -> str:
    """The run of a job's first training of its encoder."""
    try:
        trainings = parse_json(results.read_text(encoding="utf-8"))["trainings"]
        found = next(one["run_id"] for one in trainings if (one["start"], one["seed"]) == FIRST)
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise InputError(f"{RESULTS}: damaged ({error!r}); give the folder of one training's detector") from None
    return str(found)


def _read(path: Path) -> tuple[Pixels, int]:
    """The pixels of an image, and its orientation."""
    try:
        content = path.read_bytes()
        return decode(content), orientation_of(content)
    except (OSError, BadSample) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}; take it out of the folder") from None


def _empty(detector: Detector, config: PredictConfig, truth: Json | None) -> Json:
    """The COCO file before its images; categories are the truth's where there is one, so that ids agree."""
    own = [{"id": number, "name": name} for number, name in enumerate(detector.classes, start=1)]
    categories = own if truth is None else truth["categories"]
    info = {"description": "by ca2cl detect predict", "version": __version__, "detector": config.detector}
    return {"info": info, "licenses": [], "categories": categories, "images": [], "annotations": []}


def _add(data: Json, path: Path, pixels_HWC: Pixels, found: Detections, truth: Json | None) -> Json:
    """List the image and what was found in it; returns the image's entry."""
    height, width = pixels_HWC.shape[:2]
    image: Json = {"id": len(data["images"]) + 1, "file_name": path.name, "height": height, "width": width}
    if truth is not None:
        image = next(one for one in truth["images"] if one["file_name"] == path.name)
        if (image["height"], image["width"]) != (height, width):
            raise InputError(f"{path}: {height, width} pixels, its truth says {image['height'], image['width']}")
    data["images"].append(image)
    for row in coco_results(image["id"], found, [category["id"] for category in data["categories"]]):
        row["id"] = len(data["annotations"]) + 1
        row["area"] = row["bbox"][2] * row["bbox"][3]
        if "segmentation" in row:
            row["area"] = int(mask_tools().area(row["segmentation"]))
        data["annotations"].append({**row, "iscrowd": 0})
    return image


def _write(folder: Path, path: Path, pixels_HWC: Pixels, found: Detections, config: PredictConfig) -> Ids | None:
    """The image's mask and overlay; the mask, where the detector has any."""
    ids_HW = None
    if found.masks_N is not None:
        ids_HW = label_mask(found, *pixels_HWC.shape[:2], min_score=config.min_score)
        (folder / "masks").mkdir(exist_ok=True)
        PILImage.fromarray(ids_HW.astype(np.uint16)).save(folder / "masks" / f"{path.stem}.png")
    if config.overlays:
        (folder / "overlays").mkdir(exist_ok=True)
        drawn = draw_overlay(pixels_HWC, found, config.min_score)
        PILImage.fromarray(drawn).save(folder / "overlays" / f"{path.stem}.png")
    return ids_HW
