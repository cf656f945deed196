"""Polygons of QuPath's GeoJSON.

The format is that of QuPath's export of objects (https://qupath.readthedocs.io/en/stable/docs/advanced/
exporting_annotations.html): features in level-0 pixels whose ``properties`` have an ``objectType`` and a
``classification``. Files of QuPath 0.2 to 0.3 spell both otherwise and are read too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ca2cl.common.records import is_text, parse_json
from ca2cl.slides.regions.polygons import Damaged, Outlines, check_range

_NOT_ANNOTATIONS = {"cell", "detection", "tile", "root", "tmaCore", "tma_core"}
_NOT_ANNOTATIONS |= {"PathCellObject", "PathDetectionObject", "PathTileObject", "PathRootObject", "TMACoreObject"}
_NO_AREA = {"Point", "MultiPoint", "LineString", "MultiLineString"}


def read_geojson(data: bytes, found: Outlines) -> None:
    """Add the annotations of a FeatureCollection, a list of features or one feature to ``found``.

    Raises:
        Damaged: it is none of these; names the place.
    """
    try:
        value = parse_json(data)
    except ValueError as error:
        raise Damaged(f"not JSON ({error})") from None
    pending = [(f"features[{place}]", feature) for place, feature in enumerate(_features(value))]
    while pending:
        place, feature = pending.pop()
        pending += _read_feature(feature, place, found)


def _features(value: Any) -> list[Any]:
    if isinstance(value, dict) and value.get("type") == "Feature":
        return [value]
    if isinstance(value, dict) and value.get("type") != "FeatureCollection":
        raise Damaged(f"type is {value.get('type')!r:.60}, not FeatureCollection or Feature")
    features = value.get("features") if isinstance(value, dict) else value
    if not isinstance(features, list):
        raise Damaged(f"features is {features!r:.60}, not a list")
    return features


def _read_feature(feature: Any, place: str, found: Outlines) -> list[tuple[str, Any]]:
    """Add one feature; returns the features below it in QuPath's hierarchy."""
    if not isinstance(feature, dict):
        raise Damaged(f"{place} is {feature!r:.60}, not a feature")
    properties = feature.get("properties") or {}
    if not isinstance(properties, dict):
        raise Damaged(f"{place}.properties is {properties!r:.60}, not an object")
    # In 0.2 the feature's id was its kind; "object_type" is 0.3's.
    kinds = (properties.get("objectType"), properties.get("object_type"), properties.get("type"), feature.get("id"))
    kind = next((kind for kind in kinds if kind is not None), None)
    if isinstance(kind, str) and kind in _NOT_ANNOTATIONS:
        found.ignored += 1
    else:
        _add_geometry(feature.get("geometry"), _class_name(properties.get("classification"), place), place, found)
    children = properties.get("childObjects") or properties.get("children") or []
    if not isinstance(children, list):
        raise Damaged(f"{place}.properties.childObjects is {children!r:.60}, not a list")
    return [(f"{place}.childObjects[{n}]", child) for n, child in enumerate(children)]


def _class_name(value: Any, place: str) -> str | None:
    """Name of a classification as QuPath shows it: ``Tumor``, or ``Tumor: Positive`` for one derived from another."""
    names = list[Any]()
    if isinstance(value, dict) and value.get("names"):
        names = value["names"] if isinstance(value["names"], list) else [value["names"]]
    elif isinstance(value, dict):
        at: Any = value
        while isinstance(at, dict) and at.get("name") is not None:
            names.insert(0, at["name"])
            at = at.get("parentClass")
    elif value is not None:
        names = [value]
    if not all(is_text(name) and name.isprintable() for name in names):
        raise Damaged(f"{place}.properties.classification is {value!r:.60}, not a name")
    return ": ".join(names).strip() or None


def _add_geometry(geometry: Any, name: str | None, place: str, found: Outlines) -> None:
    """Add the polygons of a geometry, those in collections included."""
    pending = [geometry]
    while pending:
        one = pending.pop()
        if one is None:  # GeoJSON's feature without a place
            found.ignored += 1
            continue
        kind = one.get("type") if isinstance(one, dict) else one
        if kind == "GeometryCollection":
            pending += _items(one.get("geometries"), f"{place}.geometry.geometries")
        elif kind in ("Polygon", "MultiPolygon"):
            coordinates = _items(one.get("coordinates"), f"{place}.geometry.coordinates")
            for rings in [coordinates] if kind == "Polygon" else coordinates:
                points = [_points(ring, place) for ring in _items(rings, f"{place}.geometry.coordinates")]
                found.add(points, name, is_open=any(len(p) and (p[0] != p[-1]).any() for p in points))
        elif isinstance(kind, str) and kind in _NO_AREA:
            found.ignored += 1
        else:
            raise Damaged(f"{place}.geometry.type is {kind!r:.60}, none of GeoJSON's")


def _items(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise Damaged(f"{place} is {value!r:.60}, not a list")
    return value


def _points(ring: Any, place: str) -> NDArray[np.float64]:
    """Corners of a ring of ``[x, y]`` or ``[x, y, z]``, of shape (P, 2)."""
    if ring == []:
        return np.empty((0, 2))
    try:
        array = np.asarray(ring)
    except ValueError:  # rows of different lengths
        array = np.empty(0)
    if array.dtype.kind not in "iuf" or array.ndim != 2 or array.shape[1] < 2:
        raise Damaged(f"{place}.geometry: a ring is {ring!r:.60}, not a list of [x, y]")
    points_P2 = array[:, :2].astype(np.float64)
    check_range(points_P2, f"{place}.geometry")
    return points_P2
