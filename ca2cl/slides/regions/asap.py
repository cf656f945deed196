"""Polygons of ASAP's XML annotations, the format of the CAMELYON data sets.

The elements are those that ASAP (https://github.com/computationalpathologygroup/ASAP) writes: ``Annotation`` with
``Name``, ``Type`` and ``PartOfGroup``, and below it ``Coordinate`` with ``Order``, ``X`` and ``Y`` in level-0 pixels.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np

from ca2cl.slides.regions.polygons import Damaged, Outlines, check_range

_ROOT = "ASAP_Annotations"
_AREAS = {"polygon", "rectangle", "spline"}
_NO_GROUP = {"", "None"}


class _WithoutDoctype(ET.TreeBuilder):
    """A document type may define entities that expand to more than memory holds, or name other files."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise Damaged(f"has a DOCTYPE ({name}), which no annotation needs")


def read_asap(data: bytes, found: Outlines) -> None:
    """Add the polygons, rectangles and splines of an XML text to ``found``.

    A class is the group that an annotation is part of. A spline is taken as the polygon of its points.

    Raises:
        Damaged: it is not such a file; names the place.
    """
    try:
        root = ET.fromstring(data, ET.XMLParser(target=_WithoutDoctype()))
    except Damaged:
        raise
    except (ET.ParseError, LookupError, ValueError) as error:  # the latter two: encodings that Python does not know
        raise Damaged(f"not XML ({error})") from None
    if root.tag != _ROOT:
        raise Damaged(f"its root is <{root.tag:.60}>, not <{_ROOT}>")
    for number, annotation in enumerate(root.iter("Annotation")):
        if annotation.get("Type", "Polygon").lower() not in _AREAS:
            found.ignored += 1
            continue
        group = annotation.get("PartOfGroup", "").strip()
        _add(annotation, None if group in _NO_GROUP else group, f"Annotation {number + 1}", found)


def _add(annotation: ET.Element, name: str | None, place: str, found: Outlines) -> None:
    rows = [(_number(c, "Order", place, n), _number(c, "X", place), _number(c, "Y", place))
            for n, c in enumerate(annotation.iter("Coordinate"))]  # fmt: skip
    if name is not None and not name.isprintable():
        raise Damaged(f"{place}: PartOfGroup is {name!r:.60}, not a name")
    points_P2 = np.array(sorted(rows, key=lambda row: row[0]), np.float64).reshape(-1, 3)[:, 1:]
    check_range(points_P2, place)
    found.add([points_P2], name)


def _number(coordinate: ET.Element, attribute: str, place: str, default: int | None = None) -> float:
    text = coordinate.get(attribute)
    if text is None and default is not None:
        return float(default)
    try:
        return float(text or "")
    except ValueError:
        raise Damaged(f"{place}: {attribute} is {text!r:.60}, not a number") from None
