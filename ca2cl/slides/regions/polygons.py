"""Outlines of annotations as valid polygons with class names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

FARTHEST = 2.0**31
"""Coordinates of level-0 pixels lie below: no slide is a hundredth of that wide."""


class Damaged(ValueError):
    """Fault of an annotation file, with its place in the file."""


@dataclass(frozen=True)
class Regions:
    """Annotated regions of one slide in level-0 pixels. They may overlap."""

    path: Path
    """The file that they were read from."""
    shapes_M: NDArray[np.object_]
    """Valid polygons with an area, some in several parts."""
    names: tuple[str | None, ...]
    """Class of each shape, None for a region of interest without class."""
    repaired: int = 0
    """Number of outlines that crossed themselves or were open."""
    ignored: int = 0
    """Number of points, lines, cells, detections and shapes without an area."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, sorted."""
        return tuple(sorted({name for name in self.names if name is not None}))

    def of_class(self, name: str | None) -> NDArray[np.object_]:
        """The shapes of one class; those without class for None."""
        return self.shapes_M[[other == name for other in self.names]] if self.names else self.shapes_M


@dataclass
class Outlines:
    """Collector of what a reader finds in a file."""

    shapes: list[Any] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)
    repaired: int = 0
    ignored: int = 0

    def add(self, rings: Sequence[NDArray[np.float64]], name: str | None, *, is_open: bool = False) -> None:
        """Add one polygon.

        Args:
            rings: corners of its outline and of its holes, each of shape (P, 2). The last may repeat the first.
            name: its class.
            is_open: True if that counts as a repair, since a last corner should have repeated the first.
        """
        lines = [_ring(points_P2) for points_P2 in rings]
        if not lines or lines[0] is None:
            self.ignored += 1
            return
        holes = [line for line in lines[1:] if line is not None]
        shape = shapely.polygons(lines[0], holes=holes or None)
        crossed = not shapely.is_valid(shape)
        if crossed:
            # By structure, all that a loop goes around is inside. By linework, what it goes around twice is a hole.
            shape = shapely.make_valid(shape, method="structure", keep_collapsed=False)
        if not shapely.area(shape) > 0:
            self.ignored += 1
            return
        self.repaired += crossed or is_open
        self.shapes.append(shape)
        self.names.append(name)

    def regions(self, path: Path) -> Regions:
        """All of them as read from ``path``."""
        return Regions(path, object_array(self.shapes), tuple(self.names), self.repaired, self.ignored)


def object_array(shapes: Sequence[Any]) -> NDArray[np.object_]:
    """Shapes as a NumPy array of shape (M,)."""
    array = np.empty(len(shapes), object)
    array[:] = shapes
    return array


def _ring(points_P2: NDArray[np.float64]) -> Any | None:
    """A closed line through the points; None where there are too few to go around something."""
    return shapely.linearrings(points_P2) if len(np.unique(points_P2, axis=0)) >= 3 else None


def check_range(points_P2: NDArray[np.float64], place: str) -> None:
    """Refuse coordinates that are no pixels: not finite or far outside of any slide."""
    bad = ~(np.abs(points_P2) < FARTHEST)
    if bad.any():
        raise Damaged(f"{place}: a coordinate is {points_P2[bad][0]}, not a level-0 pixel")
