"""Tiles with classes and scores as GeoJSON that QuPath opens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from ca2cl.common.files import replacing, writing
from ca2cl.common.records import parse_json

Colour = tuple[int, int, int]
"""Red, green and blue from 0 to 255."""
_REMEDY = "give a file in a folder you can write"
_DECIMALS = 2  # of a pixel, as QuPath writes them


def write_geojson(
    path: Path,
    boxes_N4: NDArray[np.float64],
    index_N: NDArray[np.integer[Any]],
    classes: Mapping[str, Colour],
    measurements: Mapping[str, NDArray[np.floating[Any]]] | None = None,
    *,
    merge: bool = False,
    counted: str = "tiles",
) -> None:
    """Write tiles to a file for QuPath's "Import objects from file".

    Each tile is a detection, which QuPath colours by class, or by a measurement in its measurement maps. Merged, each
    class is one annotation: the union of its boxes, with their number and the means of the measurements.

    Args:
        path: the file, replaced once it is whole.
        boxes_N4: x0, y0, x1, y1 of each tile, or other box, in level-0 pixels.
        index_N: each tile's class as an index of ``classes``; negative for none.
        classes: names and their colours. QuPath keeps its own colour of a name that it knows.
        measurements: numbers of each tile by name, of shape (N,). One that is not finite is left out.
        merge: True for one annotation a class.
        counted: name of an annotation's number of boxes.

    Raises:
        InputError: the file cannot be written.
    """
    names = [{"name": name, "color": list(colour)} for name, colour in classes.items()]
    boxes_N4 = boxes_N4.round(_DECIMALS)
    measurements = measurements or {}
    features = (
        _merged(boxes_N4, index_N, names, measurements, counted)
        if merge
        else _tiles(boxes_N4, index_N, names, measurements)
    )
    with writing(path, _REMEDY), replacing(path) as file:
        file.write(b'{"type": "FeatureCollection", "features": [')
        for number, feature in enumerate(features):
            file.write((",\n" if number else "\n").encode() + json.dumps(feature, allow_nan=False).encode())
        file.write(b"\n]}\n")


def _tiles(
    boxes_N4: NDArray[np.float64],
    index_N: NDArray[np.integer[Any]],
    names: Sequence[Mapping[str, Any]],
    measurements: Mapping[str, NDArray[np.floating[Any]]],
) -> Iterator[dict[str, Any]]:
    for n, ((x0, y0, x1, y1), index) in enumerate(zip(boxes_N4.tolist(), index_N.tolist(), strict=True)):
        corners = [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]
        numbers = {name: float(values_N[n]) for name, values_N in measurements.items()}
        geometry = {"type": "Polygon", "coordinates": [corners]}
        yield _feature("detection", geometry, names[index] if index >= 0 else None, numbers)


def _merged(
    boxes_N4: NDArray[np.float64],
    index_N: NDArray[np.integer[Any]],
    names: Sequence[Mapping[str, Any]],
    measurements: Mapping[str, NDArray[np.floating[Any]]],
    counted: str,
) -> Iterator[dict[str, Any]]:
    for index in sorted(set(index_N.tolist())):
        of_class_N = index_N == index
        union = shapely.union_all(shapely.box(*boxes_N4[of_class_N].T))
        geometry = parse_json(shapely.to_geojson(shapely.simplify(union, 0)))  # 0: no corners on straight lines
        numbers = {counted: float(of_class_N.sum())}
        for name, values_N in measurements.items():
            finite = values_N[of_class_N & np.isfinite(values_N)]
            numbers[name] = float(finite.mean()) if len(finite) else np.nan
        yield _feature("annotation", geometry, names[index] if index >= 0 else None, numbers)


def _feature(
    kind: str, geometry: Mapping[str, Any], classification: Mapping[str, Any] | None, numbers: Mapping[str, float]
) -> dict[str, Any]:
    properties: dict[str, Any] = {"objectType": kind}
    if classification is not None:
        properties["classification"] = classification
    finite = {name: number for name, number in numbers.items() if np.isfinite(number)}
    if finite:
        properties["measurements"] = finite
    return {"type": "Feature", "geometry": geometry, "properties": properties}
