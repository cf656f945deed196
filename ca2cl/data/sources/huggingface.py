"""Tile source for Hugging Face ``datasets``: the hub, ``save_to_disk``, Parquet."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt

from ca2cl.common.records import is_file_name, lies_in, parse_json
from ca2cl.data.sources.base import SourceOptions, Tile, TileReader, safe_key
from ca2cl.data.sources.choose import is_saved
from ca2cl.data.sources.names import shown
from ca2cl.errors import InputError

_IMAGE_COLUMNS = ("image", "img", "tile")
_LABEL_COLUMNS = ("label", "labels", "class")


class DatasetSource:
    """One split of a Hugging Face dataset, its images' encoded bytes kept as they are.

    Columns are found by type and by usual names when they are not named: the one image column; the one ``ClassLabel``
    column, or ``label``. Integer and string labels become classes in sorted order.
    """

    def __init__(self, source: str, options: SourceOptions, *, mixed: bool = False) -> None:
        dataset, split = _load(source, options.split)
        self.name = source if source.startswith("hf:") else shown(Path(source).resolve().name)
        self._split = split
        if not len(dataset):
            raise InputError(f"{source}: split {split!r} is empty; choose another with --split")
        image = _image_column(source, dataset, options.image_column)
        self.classes: list[str] = []
        self.labels: npt.NDArray[np.int32] = np.full(len(dataset), -1, np.int32)
        label = None if options.unlabelled else _label_column(source, dataset, options.label_column)
        if label is not None:
            self.classes, self.labels = _labels(source, dataset, label)
        self._groups: list[Any] | None = None
        if options.group_column is not None:
            _require_column(source, dataset, "group_column", options.group_column)
            self._groups = [None if _is_missing(group) else group for group in dataset[options.group_column][:]]
        self.ungrouped = [row for row, group in enumerate(self._groups or ()) if group is None]
        self.digest = self._digest(dataset, image, label)
        self.reader: TileReader = DatasetReader(f"{source}:{split}", _encoded(dataset, image), image, _homes(source))

    def _digest(self, dataset: Any, image: str, label: str | None) -> str:
        parts = [self._split, dataset._fingerprint, repr(dataset.features), image, str(label), str(self._groups)]
        return hashlib.sha256("\0".join(parts).encode() + self.labels.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def tiles(self, rows: Iterable[int]) -> list[Tile]:
        """The tiles with these row numbers."""
        return [self._tile(int(row)) for row in rows]

    def _tile(self, row: int) -> Tile:
        group = None if self._groups is None or self._groups[row] is None else str(self._groups[row])
        key = f"{safe_key(self._split)}-{row:09d}"
        label = int(self.labels[row])
        return Tile(key=key, name=f"{self._split}[{row}]", row=row, label=label, group=group, ext=None)


@dataclass(frozen=True)
class DatasetReader:
    """Reads tiles of a ``DatasetSource``; the dataset is memory-mapped, so it pickles small."""

    prefix: str
    dataset: Any
    column: str
    homes: tuple[Path, ...]
    """Folders that a row may name a file in: a dataset from elsewhere must not have other files put into shards."""

    def where(self, tile: Tile) -> str:
        return f"{self.prefix}[{tile.row}]"

    def read(self, tile: Tile) -> bytes:
        value = self.dataset[tile.row][self.column]
        if isinstance(value, dict):
            path = value.get("path")
            value = value.get("bytes")
            if value is None and path:
                return self._file(tile, Path(path))
        if not isinstance(value, bytes):
            raise InputError(
                f"{self.where(tile)}: no image bytes in column {self.column!r}; leave it out with --bad skip"
            )
        return value

    def _file(self, tile: Tile, path: Path) -> bytes:
        try:
            if not any(lies_in(home, path) for home in self.homes):
                raise InputError(f"{self.where(tile)}: {path} lies outside the dataset; leave it out with --bad skip")
            return path.read_bytes()
        except InputError:
            raise
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            told = getattr(error, "strerror", None) or error
            raise InputError(f"{self.where(tile)}: {path} cannot be read ({told})") from None


def _homes(source: str) -> tuple[Path, ...]:
    """The saved dataset's folder; for the hub's, its caches, or the folder that ``hf:FOLDER`` names."""
    if not source.startswith("hf:"):
        return (Path(source) if Path(source).is_dir() else Path(source).parent,)
    from huggingface_hub import constants

    caches = (Path(datasets.config.HF_DATASETS_CACHE), Path(constants.HF_HUB_CACHE))
    folder = Path(source.removeprefix("hf:"))
    return (*caches, folder) if folder.is_dir() else caches


def _check_files(root: Path) -> None:
    """ValueError where a saved dataset names files outside of its folder."""
    splits = [root]
    listed = root / "dataset_dict.json"
    if listed.is_file():
        splits = [root / _own(name) for name in parse_json(listed.read_text(encoding="utf-8"))["splits"]]
    for folder in splits:
        state = parse_json((folder / "state.json").read_text(encoding="utf-8"))
        for file in state["_data_files"]:
            _own(file["filename"])


def _own(name: Any) -> str:
    if not is_file_name(name):
        raise ValueError(f"{name!r:.100} is no file of its folder")
    return str(name)


def _load(source: str, split: str | None) -> tuple[Any, str]:
    """The dataset and the name of its split."""
    try:
        if source.startswith("hf:"):
            loaded = datasets.load_dataset(source.removeprefix("hf:"), split=split)
        elif is_saved(Path(source)):
            _check_files(Path(source))
            loaded = datasets.load_from_disk(source)
        elif Path(source).is_file():
            loaded = datasets.load_dataset("parquet", data_files=source, split=split)
        else:  # by its files' names: train-00000-of-00002.parquet, test/...
            loaded = datasets.load_dataset("parquet", data_dir=source, split=split)
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        remedy = "check name, split and network" if source.startswith("hf:") else "check the split and its files"
        if is_saved(Path(source)):
            remedy = "save it again, whole and with_format(None)"
        raise InputError(f"{source}: cannot be loaded as a dataset ({reason}); {remedy}") from None
    if not isinstance(loaded, dict):
        own = str(loaded.split or "")
        if split is not None and own not in ("", split) and is_saved(Path(source)):
            raise InputError(
                f"{source}: split is {split!r}, but this is the split {own!r} alone; give the other's folder"
            )
        return _plain(loaded), split or own or "train"
    if split is None and len(loaded) == 1:
        split = next(iter(loaded))
    if split is None or split not in loaded:
        raise InputError(f"{source}: split is {split!r}; choose one of {', '.join(loaded)} with --split")
    return _plain(loaded[split]), split


def _plain(dataset: Any) -> Any:
    """The dataset without its format, which ``save_to_disk`` keeps: it makes labels tensors, arrays or frames, and
    leaves columns out."""
    form = dataset.format
    if form["type"] is None and set(form["columns"]) == set(dataset.column_names):
        return dataset  # whose fingerprint, and so the plan of shards begun earlier, stays as it was
    return dataset.with_format(None)


def _require_column(source: str, dataset: Any, field: str, name: str) -> None:
    if name not in dataset.column_names:
        raise InputError(f"{source}: {field} is {name!r}; the columns are {', '.join(dataset.column_names)}")


def _image_column(source: str, dataset: Any, name: str | None) -> str:
    if name is not None:
        _require_column(source, dataset, "image_column", name)
        return name
    images = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    named = [column for column in _IMAGE_COLUMNS if column in dataset.column_names]
    if len(images) == 1 or (not images and named):
        return str((images or named)[0])
    raise InputError(
        f"{source}: {len(images)} image columns; name one of {', '.join(dataset.column_names)} with --image_column"
    )


def _label_column(source: str, dataset: Any, name: str | None) -> str | None:
    if name is not None:
        _require_column(source, dataset, "label_column", name)
        return name
    typed = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    named = [column for column in _LABEL_COLUMNS if column in dataset.column_names]
    if len(typed) > 1:
        raise InputError(f"{source}: several label columns; name one of {', '.join(typed)} with --label_column")
    return next(iter(typed or named), None)


def _labels(source: str, dataset: Any, column: str) -> tuple[list[str], npt.NDArray[np.int32]]:
    """Classes and the label of every row, -1 where it is missing."""
    values = [_label(value) for value in dataset[column][:]]
    feature = dataset.features[column]
    if isinstance(feature, datasets.ClassLabel):
        number = {label: label for label in range(len(feature.names))}
        classes = list(feature.names)
    else:
        kinds = {type(value) for value in values if value is not None}
        if len(kinds) > 1 or not kinds <= {int, str, bool}:
            raise InputError(f"{source}: label column {column!r} holds {feature}; it must hold integers or strings")
        distinct = sorted({value for value in values if value is not None})
        number = {value: label for label, value in enumerate(distinct)}
        classes = [str(value) for value in distinct]
    unknown = next((row for row, value in enumerate(values) if value not in number and value not in (None, -1)), None)
    if unknown is not None:
        raise InputError(
            f"{source}: label column {column!r} holds {values[unknown]!r} in row {unknown}, which is none of its "
            f"{len(classes)} classes; correct it"
        )
    return classes, np.fromiter((number.get(value, -1) for value in values), np.int32, len(values))


def _is_missing(group: Any) -> bool:
    """True if a column's value names no slide: null, an empty text, or NaN, which does not equal itself."""
    return group is None or group == "" or group != group


def _label(value: Any) -> Any:
    """A label as it was before pandas: it makes whole numbers floats where one is missing, and that one NaN."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else None if math.isnan(value) else value
    return value


def _encoded(dataset: Any, column: str) -> Any:
    if isinstance(dataset.features[column], datasets.Image):
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset.select_columns([column])
