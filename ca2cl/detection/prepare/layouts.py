"""Find images and masks in the layouts of GlaS, CRAG and alike.

GlaS lies flat: ``train_N``, ``testA_N``, ``testB_N`` and, beside each, the same name with ``_anno``. CRAG has
``train`` and ``valid``, each with ``Images`` and ``Annotation``. ``masks`` is any folder of images beside one of
masks of the same names, or such pairs in folders that are then the splits. What systems leave behind
(``names.is_clutter``) is passed over, and lone folders are stepped into, as archives unzip.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ca2cl.data.sources.image_folder import EXTENSIONS
from ca2cl.data.sources.names import as_text, is_clutter
from ca2cl.detection.coco.instances import MASK_EXTENSIONS
from ca2cl.errors import InputError

GLAS_SPLITS = ("train", "testA", "testB")
CRAG_SPLITS = ("train", "valid")
ONE_SPLIT = "all"
_GLAS_NAME = re.compile(rf"({'|'.join(GLAS_SPLITS)})_(\d+)")
_MASK = "_anno"


@dataclass(frozen=True)
class Picture:
    """An image and the mask that belongs to it."""

    split: str
    name: str
    """The image's file name without its extension; one of a kind in its split."""
    image: Path
    mask: Path


@dataclass(frozen=True)
class Archive:
    """The images of an archive."""

    root: Path
    """The folder that the layout begins at."""
    pictures: list[Picture]
    """Split by split, as published, and in order of their names' numbers."""


def find_pictures(dataset: str, source: Path, images: str, masks: str) -> Archive:
    """The images of ``source`` with their masks.

    Args:
        dataset: one of ``DATASETS``.
        images, masks: names of the two folders, for ``masks``.

    Raises:
        InputError: no such folder, another layout, an image without a mask or the other way round, or two files that
            claim one name.
    """
    if not source.is_dir():
        raise InputError(f"{source}: no such folder; give the folder that the archive was unzipped to")
    if dataset == "glas":
        return _glas(source)
    if dataset == "crag":
        images, masks = "Images", "Annotation"
    root = _stepped(source, lambda folder: bool(_pairs(folder, images, masks)))
    pairs = _pairs(root, images, masks)
    if dataset == "crag":
        missing = [split for split in CRAG_SPLITS if split not in pairs]
        if missing:
            raise InputError(
                f"{root}: no {missing[0]}/Images beside {missing[0]}/Annotation, so it is not CRAG's layout; "
                "unzip the whole archive, or use masks for a part of it"
            )
        pairs = {split: pairs[split] for split in CRAG_SPLITS}
    elif not pairs:
        raise InputError(
            f"{root}: no folder {images} beside a folder {masks}, here or in folders below; "
            "name them with --images and --masks"
        )
    elif ONE_SPLIT not in pairs:
        _refuse_halves(root, images, masks)
    return Archive(root, [one for split in sorted(pairs, key=_natural) for one in _paired(split, *pairs[split])])


def _glas(source: Path) -> Archive:
    def fits(folder: Path) -> bool:
        return any(_GLAS_NAME.match(path.stem) for path in images_in(folder))

    root = _stepped(source, fits)
    if not fits(root):
        raise InputError(
            f"{root}: no image is named as in GlaS (train_1, testA_1, testB_1); "
            "give the folder that the archive was unzipped to, or use masks"
        )
    files = by_name(images_in(root))
    known = {name for name in files if _GLAS_NAME.fullmatch(name)}
    stray = next((name for name in files if name not in known and name.removesuffix(_MASK) not in known), None)
    if stray is not None:
        reason = "a mask without its image" if stray.endswith(_MASK) else "not a name of GlaS"
        raise InputError(f"{files[stray]}: {reason}; restore what is missing, or move it out of the folder")
    pictures = [
        Picture(name.partition("_")[0], name, files[name], _mask(files[name], files.get(name + _MASK)))
        for name in sorted(known, key=_natural)
    ]
    return Archive(root, sorted(pictures, key=lambda picture: GLAS_SPLITS.index(picture.split)))


def _paired(split: str, images: Path, masks: Path) -> list[Picture]:
    """The pictures of two folders whose files have the same names."""
    image_of, mask_of = by_name(images_in(images)), by_name(images_in(masks))
    if not image_of:
        raise InputError(f"{images}: no images here; give a folder with files of {' '.join(sorted(EXTENSIONS))}")
    alone = next((name for name in mask_of if name not in image_of), None)
    if alone is not None:
        raise InputError(f"{mask_of[alone]}: a mask without its image in {images}; restore or remove one of them")
    names = sorted(image_of, key=_natural)
    return [Picture(split, name, image_of[name], _mask(image_of[name], mask_of.get(name), masks)) for name in names]


def _mask(image: Path, mask: Path | None, folder: Path | None = None) -> Path:
    if mask is None:
        wanted = f"{folder}/{image.stem}.png" if folder else f"{image.stem}{_MASK}{image.suffix}"
        raise InputError(f"{image}: has no mask; restore {wanted}, or move the image away")
    if mask.suffix[1:].lower() not in MASK_EXTENSIONS:
        raise InputError(f"{mask}: {mask.suffix} may change numbers; give masks of {' '.join(sorted(MASK_EXTENSIONS))}")
    return mask


def _pairs(root: Path, images: str, masks: str) -> dict[str, tuple[Path, Path]]:
    """Split → folders of images and masks, below ``root`` itself or in the folders in it."""
    here = _children(root)
    if images.lower() in here and masks.lower() in here:
        return {ONE_SPLIT: (here[images.lower()], here[masks.lower()])}
    found: dict[str, tuple[Path, Path]] = {}
    for folder in here.values():
        inner = _children(folder)
        if images.lower() in inner and masks.lower() in inner:
            found[folder.name] = (inner[images.lower()], inner[masks.lower()])
    return found


def _refuse_halves(root: Path, images: str, masks: str) -> None:
    for folder in _children(root).values():
        inner = _children(folder)
        has = [name for name in (images, masks) if name.lower() in inner]
        if len(has) == 1:
            other = masks if has == [images] else images
            raise InputError(f"{folder}: has {has[0]} and no {other}; restore that, or move the folder away")


def _stepped(root: Path, fits: Callable[[Path], bool]) -> Path:
    """``root``, or the folder that holds the layout, where each on the way to it is the only one in its own."""
    folder = root
    while not fits(folder):
        inner = list(_children(folder).values())
        if len(inner) != 1:
            return root if folder is root or not inner else folder
        folder = inner[0]
    return folder


def _entries(folder: Path) -> list[Path]:
    try:
        found = sorted(path for path in folder.iterdir() if not is_clutter(path.name))
        broken = next((path for path in found if path.is_symlink() and not path.exists()), None)
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from None
    if broken is not None:
        raise InputError(
            f"{broken}: a link to {broken.readlink()}, which is not there; mount the disk it leads to, or remove it"
        )
    return found


def _children(folder: Path) -> dict[str, Path]:
    """Folders by their names in lower case: copies of the archives differ in it."""
    named: dict[str, Path] = {}
    for path in _with_text([path for path in _entries(folder) if path.is_dir()]):
        twin = named.setdefault(path.name.lower(), path)
        if twin is not path:
            raise InputError(f"{path}: {twin.name} lies beside it; join the two, or rename one")
    return named


def images_in(folder: Path) -> list[Path]:
    """The images of a folder, not of those in it, in order of their names."""
    return _with_text([path for path in _entries(folder) if path.suffix[1:].lower() in EXTENSIONS and path.is_file()])


def _with_text(paths: list[Path]) -> list[Path]:
    """The paths, if a COCO file can name them."""
    other = next((path for path in paths if as_text(path.name) is None), None)
    if other is not None:
        raise InputError(f"{other.parent}: the name of {os.fsencode(other.name)!r} is not UTF-8; rename it")
    return paths


def by_name(paths: Sequence[Path]) -> dict[str, Path]:
    """The files by their names without extension.

    Raises:
        InputError: two have the same.
    """
    named: dict[str, Path] = {}
    for path in paths:
        if path.stem in named:
            raise InputError(f"{path}: {named[path.stem].name} has the same name; keep one of the two")
        named[path.stem] = path
    return named


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """train_2 before train_10; numbers before words."""
    pieces = re.findall(r"\d+|\D+", name)
    return tuple((0, int(piece), piece) if piece.isdecimal() else (1, 0, piece) for piece in pieces)
