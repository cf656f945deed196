"""Files of annotations: finding the one of a slide, and reading it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import shapely

from ca2cl.errors import InputError
from ca2cl.slides.regions.asap import read_asap
from ca2cl.slides.regions.geojson import read_geojson
from ca2cl.slides.regions.polygons import Damaged, Outlines, Regions

READERS = {".geojson": read_geojson, ".json": read_geojson, ".xml": read_asap}
"""Reader of each kind of file, by the end of its name."""
_FAR = 1.25
"""Regions are drawn over a slide's edge by hand, but not that far."""
_REMEDY = "export the annotations again, as GeoJSON from QuPath or as XML from ASAP"


def find_mask(where: Path, slide_name: str) -> Path | None:
    """The file of a slide's annotations.

    Args:
        where: a folder with ``NAME.geojson``, ``NAME.json`` or ``NAME.xml`` for every annotated slide, or one such
            file, which is then the slide's.
        slide_name: name of the slide's file. ``NAME`` is that, or that without its ending: ``a.svs.geojson`` and
            ``a.geojson`` are both for ``a.svs``.

    Returns:
        The file; None where the folder has none for that slide.

    Raises:
        InputError: ``where`` is not there or of another kind, or the folder has two files for that slide.
    """
    if where.is_file():
        if where.suffix.lower() not in READERS:
            raise InputError(f"mask is {str(where)!r}: not {_listed()}; {_REMEDY}")
        return where
    if not where.is_dir():
        raise InputError(f"mask is {str(where)!r}: not there; give a folder or a file of annotations")
    name = PurePosixPath(slide_name).name
    stem = PurePosixPath(name).stem
    for candidate in dict.fromkeys((name, stem, stem.removesuffix(".ome"))):
        found = [path for end in READERS if (path := where / (candidate + end)).is_file()]
        if len(found) > 1:
            both = " and ".join(path.name for path in found)
            raise InputError(f"mask {str(where)!r}: {both} are both for the slide {slide_name}; remove one")
        if found:
            return found[0]
    return None


def read_regions(path: Path, exclude: Sequence[str] = ()) -> Regions:
    """The annotations in a file.

    Args:
        path: QuPath's GeoJSON (``.geojson``, ``.json``) or ASAP's XML (``.xml``).
        exclude: classes whose area is cut out of all others, such as CAMELYON16's ``_2``.

    Raises:
        InputError: it cannot be read or is not such a file; names the place in it.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: not {_listed()}; {_REMEDY}")
    found = Outlines()
    try:
        reader(path.read_bytes(), found)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a file that can") from None
    except Damaged as error:
        raise InputError(f"{path}: {error}; {_REMEDY}") from None
    return _without(found.regions(path), exclude)


def check_inside(regions: Regions, width: int, height: int) -> None:
    """Refuse annotations that were drawn on another image.

    Args:
        regions: the annotations.
        width, height: size of the slide in level-0 pixels.

    Raises:
        InputError: a region lies wholly outside of the slide, or reaches beyond it by a quarter of its size.
    """
    bounds_M4 = shapely.bounds(regions.shapes_M).reshape(-1, 4)
    far = (bounds_M4[:, 2] > _FAR * width) | (bounds_M4[:, 3] > _FAR * height)
    outside = far | ~shapely.intersects(regions.shapes_M, shapely.box(0, 0, width, height))
    if outside.any():
        x0, y0, x1, y1 = shapely.bounds(regions.shapes_M[outside][0])
        raise InputError(
            f"{regions.path}: a region from ({x0:.0f}, {y0:.0f}) to ({x1:.0f}, {y1:.0f}) is not within the slide's "
            f"{width} x {height} pixels; give the annotations of this slide, in level-0 pixels"
        )


def _without(regions: Regions, exclude: Sequence[str]) -> Regions:
    """The regions of other classes than ``exclude``, less the area of these."""
    kept = [name not in exclude for name in regions.names]
    if all(kept):
        return regions
    left_M = regions.shapes_M[kept]
    cut_C = shapely.get_parts(shapely.union_all(regions.shapes_M[[not one for one in kept]]))
    for shape in cut_C:
        shapely.prepare(shape)
        near = shapely.intersects(shape, left_M)
        left_M[near] = shapely.difference(left_M[near], shape)
    names = [name for name, one in zip(regions.names, kept, strict=True) if one]
    whole = shapely.area(left_M) > 0
    return replace(
        regions,
        shapes_M=left_M[whole],
        names=tuple(name for name, one in zip(names, whole, strict=True) if one),
    )


def _listed() -> str:
    return "a file of " + ", ".join(READERS)
