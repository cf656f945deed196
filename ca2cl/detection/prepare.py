"""``ca2cl detect prepare``: images with masks of instances → COCO, split as published.

OUT gets, for every split, ``SPLIT.json`` and the folder ``SPLIT`` of its images, with the bytes that they came with.
They are copied, not linked: the sets are small (GlaS .2 GB, CRAG 1 GB), and a folder that is whole by itself can be
moved to a cluster, and does not change when somebody tidies up the archive.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

from tqdm import tqdm

from ca2cl import __version__
from ca2cl.data.atomic import fresh_folder, write_atomic, writing
from ca2cl.data.decode import BadSample, decode
from ca2cl.detection.coco import CATEGORIES, Json, annotation, mask_tools
from ca2cl.detection.instances import Dropped, FragmentRule, find_instances, read_mask
from ca2cl.detection.layouts import DATASETS, Archive, Picture, find_pictures
from ca2cl.detection.patients import facts_of, read_patients
from ca2cl.errors import InputError, nearest

logger = logging.getLogger(__name__)

POSITIONAL = ("dataset", "source", "out")
_REMEDY = "free space or give another folder and run again, nothing was kept"


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Turn images with masks of gland instances into COCO files, one for each published split.

    OUT gets SPLIT.json and a folder SPLIT with copies of the images, byte for byte, and appears when all of it is
    there. Masks become run lengths, which hold them exactly, holes included. Patients and grades are taken from a
    Grade.csv, index.csv or patients.csv (columns name, patient_id, grade) beside the images.
    """

    dataset: str
    """glas: train_N, testA_N, testB_N and NAME_anno, BMP or PNG, as GlaS unzips. crag: train and valid, each with
    Images and Annotation. masks: any folder of images beside one of masks of the same names, or such pairs in one
    folder a split. A mask is one channel, 8, 16 or 32 bits, one number an instance, 0 between them."""
    source: str
    """The folder that the archive was unzipped to."""
    out: str
    """A folder that is not there yet, or is empty."""
    images: str = "images"
    """Name of the folders of images, for masks."""
    masks: str = "masks"
    """Name of the folders of masks, for masks."""
    min_area: int = FragmentRule.min_area
    """Pixels: smaller instances are dropped, and of larger ones smaller parts that lie apart."""
    max_loss: float = FragmentRule.max_loss
    """Most of an instance's pixels that may be dropped with such parts, as a share."""
    preview: str | None = None
    """PNG to draw of a dozen images with what was made of their masks: look at it before training."""

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise InputError(f"dataset is {self.dataset!r}: {nearest(self.dataset.lower(), DATASETS)}")
        FragmentRule(self.min_area, self.max_loss)
        if self.preview is not None and Path(self.preview).suffix.lower() != ".png":
            raise InputError(f"preview is {self.preview!r}: give the name of a .png file")
        for name in ("images", "masks"):
            if not getattr(self, name) or "/" in getattr(self, name):
                raise InputError(f"{name} is {getattr(self, name)!r}: give a folder's name, without /")


def run(config: PrepareConfig) -> int:
    """Write OUT, say what is in it, and draw the preview. Returns the exit code.

    Raises:
        InputError: an image or a mask that is missing or bad, another layout, a split without instances, OUT taken or
            not writable: nothing is written then. A preview that cannot be written leaves OUT complete.
    """
    from ca2cl.detection.preview import draw_preview

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
    return 0


def prepare(archive: Archive, source: Path, folder: Path, config: PrepareConfig) -> dict[str, Json]:
    """Write every split of ``archive`` into ``folder``; returns the content of the COCO files by split."""
    table, patients = read_patients(archive, source)
    if table is None and config.dataset == "glas":
        logger.warning("%s: no Grade.csv here, so patients and grades stay unknown", archive.root)
    rule = FragmentRule(config.min_area, config.max_loss)
    splits: dict[str, Json] = {}
    with tqdm(archive.pictures, unit="image", desc="prepare", disable=None) as bar:
        for split, pictures in _by_split(archive.pictures):
            (folder / split).mkdir()
            dropped, data = Dropped(), _empty()
            for picture in pictures:
                image: Json = {"id": len(data["images"]) + 1, **_copied(picture, folder / split)}
                image.update(facts_of(picture, table, patients))
                _add(data, image, picture, rule, dropped)
                bar.update()
            if not data["annotations"]:
                raise InputError(f"{archive.root}: no instance in all of {split}; give masks that number the glands")
            data["info"] = _info(config, split, dropped)
            write_atomic(folder / f"{split}.json", json.dumps(data, ensure_ascii=False).encode(), _REMEDY)
            splits[split] = data
    return splits


def _by_split(pictures: Sequence[Picture]) -> Iterator[tuple[str, list[Picture]]]:
    for split in dict.fromkeys(picture.split for picture in pictures):
        yield split, [picture for picture in pictures if picture.split == split]


def _empty() -> Json:
    return {"info": {}, "licenses": [], "categories": list(CATEGORIES), "images": [], "annotations": []}


def _copied(picture: Picture, folder: Path) -> Json:
    """Copy the image, if it decodes; returns its name and size."""
    try:
        content = picture.image.read_bytes()
        height, width, _ = decode(content).shape
    except BadSample as error:
        raise InputError(f"{picture.image}: {error}; restore it") from None
    except OSError as error:
        raise InputError(f"{picture.image}: cannot be read ({error.strerror}); check its permissions") from None
    (folder / picture.image.name).write_bytes(content)
    return {"file_name": picture.image.name, "height": height, "width": width}


def _add(data: Json, image: Json, picture: Picture, rule: FragmentRule, dropped: Dropped) -> None:
    """Add an image and its instances to a split."""
    size = (image["height"], image["width"])
    data["images"].append(image)
    for instance in find_instances(read_mask(picture.mask, size), rule, dropped):
        data["annotations"].append(annotation(len(data["annotations"]) + 1, image["id"], instance, size))


def _info(config: PrepareConfig, split: str, dropped: Dropped) -> Json:
    """How the file was made; no time and no path, so that the same archive gives the same bytes anywhere."""
    rule = {"min_area": config.min_area, "max_loss": config.max_loss}
    return {
        "description": f"{config.dataset} {split}, by ca2cl detect prepare",
        "version": __version__,
        "dataset": config.dataset,
        "split": split,
        "fragment_rule": rule,
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
