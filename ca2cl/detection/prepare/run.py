"""``ca2cl detect prepare``: images with instance masks to COCO splits.

OUT gets, for every split, ``SPLIT.json`` and the folder ``SPLIT`` of its images, with the bytes that they came with.
They are copied, not linked: the sets are small (GlaS .2 GB, CRAG 1 GB), and a folder that is whole by itself can be
moved to a cluster, and does not change when somebody tidies up the archive.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict
from itertools import combinations, groupby
from operator import attrgetter
from pathlib import Path

from ca2cl import __version__
from ca2cl.common.console.progress import ProgressBar
from ca2cl.common.console.summary import closing
from ca2cl.common.files import fresh_folder, write_atomic, writing
from ca2cl.data.decode import BadSample, decode
from ca2cl.data.orientation import orientation_of, refuse_turned
from ca2cl.detection.coco.files import CATEGORIES, annotation
from ca2cl.detection.coco.fragment_rule import FragmentRule
from ca2cl.detection.coco.instances import Dropped, Instance, find_instances, read_mask
from ca2cl.detection.coco.segmentations import Json, mask_tools
from ca2cl.detection.prepare.config import PrepareConfig
from ca2cl.detection.prepare.layouts import Archive, Picture, find_pictures
from ca2cl.detection.prepare.mask_checks import Survey, check_numbers, split_parts
from ca2cl.detection.prepare.patients import facts_of, read_patients
from ca2cl.errors import InputError

logger = logging.getLogger(__name__)

_REMEDY = "free space or give another folder and run again, nothing was kept"


def run(config: PrepareConfig) -> int:
    """Write OUT, print a summary, and draw the preview. Returns the exit code.

    Raises:
        InputError: an image or a mask that is missing or bad, another layout, a split without instances, OUT taken or
            not writable: nothing is written then. A preview that cannot be written leaves OUT complete.
    """
    from ca2cl.detection.coco.preview import draw_preview

    mask_tools()
    source, out = Path(config.source).expanduser(), Path(config.out).expanduser()
    archive = find_pictures(config.dataset, source, config.images, config.masks)
    with writing(out, _REMEDY), fresh_folder(out) as folder:
        splits = prepare(archive, source, folder, config)
        sheet = draw_preview(folder, splits) if config.preview else None
    sys.stdout.write("".join(f"{line}\n" for line in _summary(splits)))
    if config.preview and sheet is not None:
        path = Path(config.preview).expanduser()
        remedy = f"give another path; {out} is complete"
        with writing(path, remedy):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, sheet, remedy)
        sys.stdout.write(f"preview in {path}\n")
    kind = config.dataset if config.dataset in ("glas", "crag") else "coco"
    train = ["ca2cl", "detect", "--encoder", "ENCODER", "--dataset", kind, "--data", out]
    sys.stdout.write(closing("COCO files", out, [*train, "--output_dir", f"runs/{kind}"]))
    return 0


def prepare(archive: Archive, source: Path, folder: Path, config: PrepareConfig) -> dict[str, Json]:
    """Write every split of ``archive`` into ``folder``; returns the content of the COCO files by split.

    Args:
        archive: images and masks by split.
        source: the folder that they lie in.
        folder: to write into.
        config: the verb's settings.
    """
    table, patients = read_patients(archive, source)
    if table is None and config.dataset == "glas":
        logger.warning("%s: no Grade.csv here, so patients and grades stay unknown", archive.root)
    splits: dict[str, Json] = {}
    survey = Survey(config.min_area)
    with ProgressBar(archive.pictures, unit="image", desc="prepare") as bar:
        for split, pictures in groupby(archive.pictures, attrgetter("split")):
            (folder / split).mkdir()
            dropped = Dropped()
            data: Json = {"info": {}, "licenses": [], "categories": list(CATEGORIES), "images": [], "annotations": []}
            for picture in pictures:
                image: Json = {"id": len(data["images"]) + 1, **_copied(picture, folder / split)}
                image.update(facts_of(picture, table, patients))
                size = image["height"], image["width"]
                instances = _instances(picture, size, config, dropped)
                survey.add(picture.mask, instances, size)
                data["images"].append(image)
                for number, instance in enumerate(instances, start=len(data["annotations"]) + 1):
                    data["annotations"].append(annotation(number, image["id"], instance, size))
                bar.update()
            if not data["annotations"]:
                raise InputError(f"{archive.root}: no instance in all of {split}; give masks that number the glands")
            data["info"] = _info(config, split, dropped)
            write_atomic(folder / f"{split}.json", json.dumps(data, ensure_ascii=False).encode(), _REMEDY)
            splits[split] = data
    if config.apart == "stop":
        survey.refuse_classes(archive.root)
    if survey.apart and config.apart != "split":
        few = f"{len(survey.apart)} of {survey.instances}"
        logger.warning("%s: %s instances lie in several places, the first is %s", archive.root, few, survey.apart[0])
    return splits


def _copied(picture: Picture, folder: Path) -> Json:
    """Copy the image, if it decodes; returns its name and size."""
    try:
        content = picture.image.read_bytes()
        height, width, _ = decode(content).shape
        refuse_turned(picture.image, orientation_of(content))
    except BadSample as error:
        raise InputError(f"{picture.image}: {error}; restore it") from None
    except OSError as error:
        raise InputError(f"{picture.image}: cannot be read ({error.strerror}); check its permissions") from None
    (folder / picture.image.name).write_bytes(content)
    return {"file_name": picture.image.name, "height": height, "width": width}


def _instances(picture: Picture, size: tuple[int, int], config: PrepareConfig, dropped: Dropped) -> list[Instance]:
    split = config.apart == "split"
    ids_HW = read_mask(picture.mask, size, black_and_white=split)
    if split:
        ids_HW = split_parts(ids_HW)
    else:
        check_numbers(picture.mask, ids_HW)
    return find_instances(ids_HW, FragmentRule(config.min_area, config.max_loss), dropped)


def _info(config: PrepareConfig, split: str, dropped: Dropped) -> Json:
    """How the file was made; no time and no path, so that the same archive gives the same bytes anywhere."""
    rule = {"min_area": config.min_area, "max_loss": config.max_loss}
    return {
        "description": f"{config.dataset} {split}, by ca2cl detect prepare",
        "version": __version__,
        "dataset": config.dataset,
        "split": split,
        "fragment_rule": rule,
        "apart": config.apart,
        "dropped": asdict(dropped),
    }


def _summary(splits: Mapping[str, Json]) -> list[str]:
    """A line a split, and one for every two that have patients in common: whoever reads a score should know."""
    lines: list[str] = []
    patients: dict[str, set[str]] = {}
    for split, data in splits.items():
        images, dropped = data["images"], data["info"]["dropped"]
        patients[split] = {image["patient_id"] for image in images if "patient_id" in image}
        of = f" of {len(patients[split])} patients" if patients[split] else ""
        gone = ", ".join(f"{dropped[what]} {what}" for what in ("instances", "fragments") if dropped[what])
        less = f" (dropped as too small: {gone}, {dropped['pixels']} pixels)" if gone else ""
        lines.append(f"{split}: {len(images)} images{of}, {len(data['annotations'])} instances{less}")
    for one, other in combinations(patients, 2):
        if both := patients[one] & patients[other]:
            lines.append(f"{one} and {other} share {len(both)} patients: one says little of new patients to the other")
    return lines
