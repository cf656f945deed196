"""Files of a job between slides and shards.

Slide 17 has a folder ``000017`` with ``scan.json`` and ``scan.npz``, ``thumbnail.jpg``, and ``0003.bin`` and
``0003.json`` (the encoded tiles of a piece of its grid). Each is written whole or not at all, so that a killed job goes
on with the first missing one. ``tiles.npy`` comes last.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
from PIL import Image

from ca2cl.common.files import replacing, write_atomic, writing
from ca2cl.common.records import parse_json
from ca2cl.slides.grid import Grid
from ca2cl.slides.preview import thumbnail
from ca2cl.slides.records import SlideRecord
from ca2cl.slides.scan import Scan

REMEDY = "free some space and run again, finished slides are kept; or give another folder"
PIECE = 256
"""Tiles of a task: the most that a killed process loses."""
PICTURE_PIXELS = 1000
"""Longer side of the overview that is kept for a slide's picture."""
TILE = np.dtype(
    [
        ("slide", "<i4"),
        ("piece", "<i4"),
        ("offset", "<i8"),
        ("size", "<i4"),
        ("label", "<i4"),
        ("x", "<i4"),
        ("y", "<i4"),
    ]
)
"""A row of ``tiles.npy``; x and y in level-0 pixels."""
_Damaged = (OSError, ValueError, KeyError, TypeError)


@dataclass(frozen=True)
class StoredScan:
    """A scan as it was written. ``state``: of the file that was scanned, see ``CutJob.state``."""

    record: SlideRecord
    state: list[int]
    classes: tuple[str, ...]
    grid: Grid | None
    kept: npt.NDArray[np.int64]
    """Numbers in the grid of the tiles to cut."""
    labels: npt.NDArray[np.int32]
    """Index into ``classes`` of each of them."""

    @property
    def pieces(self) -> int:
        """Tasks that cut its tiles."""
        return -(-len(self.kept) // PIECE)


@dataclass(frozen=True)
class Picture:
    """Arrays for a slide's picture. ``reasons``: code of every tile of the grid; ``mpp``: of tissue and artefacts."""

    overview: npt.NDArray[np.uint8]
    overview_mpp: float
    reasons: npt.NDArray[np.uint8]
    tissue: npt.NDArray[np.bool_]
    artefacts: dict[str, npt.NDArray[np.bool_]]
    mpp: float
    """Micrometres to a pixel of the overview."""


@dataclass(frozen=True)
class Piece:
    """Encoded tiles of one task. ``numbers``: positions in ``StoredScan.kept`` of those that were written."""

    numbers: list[int]
    sizes: list[int]
    blurred: int
    seconds: float


class Staging:
    """A job's folder of files between slides and shards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def tiles_path(self) -> Path:
        """Of the table of all tiles."""
        return self.folder / "tiles.npy"

    def bin_path(self, slide: int, piece: int) -> Path:
        """Of the encoded tiles of a task."""
        return self._of(slide) / f"{piece:04d}.bin"

    def _of(self, slide: int) -> Path:
        """Folder of a slide: one folder of all slides' files would be listed again for each of them."""
        return self.folder / f"{slide:06d}"

    def thumbnail_path(self, slide: int) -> Path:
        """Of the slide's thumbnail; there is none of a slide without a tissue mask."""
        return self._of(slide) / "thumbnail.jpg"

    def local_path(self, slide: int, path: str) -> Path:
        """Of the slide at ``path``, or of the copy of a remote one."""
        if "://" not in path:
            return Path(path)
        return self._of(slide) / "slide" / PurePosixPath(urlsplit(path).path).name

    def write_scan(self, slide: int, state: list[int], scan: Scan, preview: bool) -> None:
        """Keep a scan; with what its picture needs if ``preview``."""
        arrays: dict[str, Any] = {}
        overview_mpp = None
        if scan.reasons is not None and scan.labels is not None:
            arrays = {"kept": scan.kept, "labels": scan.labels[scan.kept]}
            if preview and scan.mask is not None and scan.overview is not None and scan.overview_mpp is not None:
                small, times = _shrunk(scan.overview)
                arrays |= {"reasons": scan.reasons, "overview": small, "tissue": scan.mask.tissue}
                arrays |= {f"is_{name}": where for name, where in scan.mask.artefacts.items()}
                overview_mpp = scan.overview_mpp * times
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        with writing(self._of(slide), REMEDY):
            self._of(slide).mkdir(exist_ok=True)
        if scan.overview is not None and scan.record.kept:
            write_atomic(self.thumbnail_path(slide), thumbnail(scan.overview), REMEDY)
        write_atomic(self._of(slide) / "scan.npz", buffer.getvalue(), REMEDY)
        content = {
            "record": asdict(scan.record),
            "state": state,
            "classes": list(scan.classes),
            "grid": asdict(scan.grid) if scan.grid else None,
            "mask_mpp": scan.mask.mpp if scan.mask else None,
            "overview_mpp": overview_mpp,
        }
        write_atomic(self._of(slide) / "scan.json", json.dumps(content).encode(), REMEDY)

    def read_scan(self, slide: int) -> StoredScan | None:
        """The scan of a slide, or None if there is none."""
        with suppress(*_Damaged):
            content = parse_json((self._of(slide) / "scan.json").read_bytes())
            with np.load(self._of(slide) / "scan.npz") as arrays:
                kept = arrays["kept"] if "kept" in arrays else np.empty(0, np.int64)
                labels = arrays["labels"] if "labels" in arrays else np.empty(0, np.int32)
            grid = Grid(**content["grid"]) if content["grid"] else None
            record = SlideRecord(**content["record"])
            return StoredScan(record, content["state"], tuple(content["classes"]), grid, kept, labels)
        return None

    def picture(self, slide: int) -> Picture | None:
        """What a slide's picture needs, or None if its scan left none."""
        with suppress(*_Damaged):
            content = parse_json((self._of(slide) / "scan.json").read_bytes())
            with np.load(self._of(slide) / "scan.npz") as arrays:
                artefacts = {name[3:]: arrays[name] for name in arrays if name.startswith("is_")}
                return Picture(
                    arrays["overview"], float(content["overview_mpp"]), arrays["reasons"], arrays["tissue"], artefacts,
                    float(content["mask_mpp"]),
                )  # fmt: skip
        return None

    def blurred(self, slide: int) -> list[int]:
        """Numbers in the grid of the tiles that were cut and then dropped as blurred."""
        scan = self.read_scan(slide)
        if scan is None:
            return []
        found = [self.read_piece(slide, piece) for piece in range(scan.pieces)]
        written = {number for piece in found if piece is not None for number in piece.numbers}
        return [int(tile) for number, tile in enumerate(scan.kept) if number not in written]

    def write_piece(self, slide: int, piece: int, data: bytes, found: Piece) -> None:
        """Keep the encoded tiles of a task."""
        path = self.bin_path(slide, piece)
        write_atomic(path, data, REMEDY)
        write_atomic(path.with_suffix(".json"), json.dumps(asdict(found)).encode(), REMEDY)

    def read_piece(self, slide: int, piece: int) -> Piece | None:
        """What a task kept, or None if it has not ended."""
        path = self.bin_path(slide, piece)
        with suppress(*_Damaged):
            found = Piece(**parse_json(path.with_suffix(".json").read_bytes()))
            if path.stat().st_size == sum(found.sizes):
                return found
        return None

    def forget(self, slide: int) -> None:
        """Remove all of a slide."""
        shutil.rmtree(self._of(slide), ignore_errors=True)

    def drop_local(self, slide: int) -> None:
        """Remove the copy of a remote slide."""
        shutil.rmtree(self._of(slide) / "slide", ignore_errors=True)

    def write_tiles(self, parts: Iterable[npt.NDArray[np.void]], count: int) -> None:
        """Write the table of all ``count`` tiles from its parts in order."""
        header = {"descr": np.lib.format.dtype_to_descr(TILE), "fortran_order": False, "shape": (count,)}
        written = 0
        with writing(self.tiles_path, REMEDY), replacing(self.tiles_path) as file:
            np.lib.format.write_array_header_2_0(file, header)
            for part in parts:
                file.write(part.tobytes())
                written += len(part)
            assert written == count, (written, count)

    def table_parts(self, slides: int, classes: tuple[str, ...]) -> Iterator[npt.NDArray[np.void]]:
        """Rows of the table, slide by slide, of slides that gave tiles."""
        for slide in range(slides):
            scan = self.read_scan(slide)
            if scan is None or scan.record.error is not None or scan.grid is None:
                continue
            corners = scan.grid.corners(scan.kept)
            boxes = np.rint(scan.grid.boxes(corners)[:, :2]).astype(np.int32)
            number = np.array([classes.index(name) for name in scan.classes] + [-1], np.int32)
            for piece in range(scan.pieces):
                found = self.read_piece(slide, piece)
                assert found is not None, (slide, piece)
                rows = np.zeros(len(found.numbers), TILE)
                rows["slide"], rows["piece"] = slide, piece
                rows["size"] = found.sizes
                rows["offset"] = np.cumsum(found.sizes) - found.sizes
                rows["label"] = number[scan.labels[found.numbers]]
                rows["x"], rows["y"] = boxes[found.numbers].T
                yield rows


def _shrunk(overview: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint8], float]:
    """An overview as its slide's picture needs it, and its pixels to one of the result."""
    height, width, _ = overview.shape
    times = max(max(height, width) / PICTURE_PIXELS, 1.0)
    size = max(round(width / times), 1), max(round(height / times), 1)
    return np.asarray(Image.fromarray(overview).resize(size, Image.Resampling.BOX)), times
