"""Share of every tile that annotations cover, and the class that follows.

Legend: N tiles, M shapes, P parts of a class's area, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from ca2cl.slides.regions.polygons import Regions

WITHOUT_CLASS = -1
"""Class index of a tile in a region of interest."""
OUTSIDE = -2
"""Class index of a tile that no region covers enough of."""
_CORNERS = 512
_DIGITS = 9  # of a share: areas that are equal on paper differ by rounding, beyond these


def classify_tiles(
    regions: Regions, boxes_N4: NDArray[np.float64], least: float, classes: Sequence[str]
) -> NDArray[np.int32]:
    """Class of each tile by the area that annotations cover.

    A tile is of the class that covers its largest share, if that is at least ``least``. Among equal shares, the first
    in ``classes`` wins. Otherwise it is ``WITHOUT_CLASS`` if regions without class cover ``least`` of it, else
    ``OUTSIDE``. Regions of the same class may overlap; what they share counts once. Regions of other classes than
    ``classes`` do not count.

    Args:
        regions: the slide's annotations.
        boxes_N4: x0, y0, x1, y1 of each tile in level-0 pixels.
        least: least share of a tile, above 0 and up to 1.
        classes: the names that the indices count.

    Returns:
        Indices of ``classes``, ``WITHOUT_CLASS`` or ``OUTSIDE``, of shape (N,).
    """
    assert 0 < least <= 1, least
    least = max(round(least, _DIGITS), 10**-_DIGITS)
    index_N = np.full(len(boxes_N4), OUTSIDE, np.int32)
    if not len(boxes_N4) or not regions.names:
        return index_N
    tiles_N = shapely.box(*boxes_N4.T)
    tree = shapely.STRtree(tiles_N)
    index_N[covered_shares(regions.of_class(None), tiles_N, tree) >= least] = WITHOUT_CLASS
    best_N = np.zeros(len(tiles_N))
    for k, name in enumerate(classes):
        share_N = covered_shares(regions.of_class(name), tiles_N, tree)
        better_N = (share_N >= least) & (share_N > best_N)
        index_N[better_N] = k
        best_N[better_N] = share_N[better_N]
    return index_N


def covered_shares(shapes_M: NDArray[np.object_], tiles_N: NDArray[np.object_], tree: Any) -> NDArray[np.float64]:
    """Share of each tile that the union of the shapes covers, rounded to 9 digits.

    Args:
        shapes_M: valid polygons; may overlap.
        tiles_N: rectangles with an area; may overlap.
        tree: an STRtree of the tiles.
    """
    share_N = np.zeros(len(tiles_N))
    parts_P = shapely.get_parts(shapely.union_all(shapes_M))
    shapely.prepare(parts_P)
    part, tile = tree.query(parts_P, predicate="intersects")
    whole = shapely.covers(parts_P[part], tiles_N[tile])
    share_N[tile[whole]] = 1
    crossed = np.setdiff1d(tile, tile[whole])  # tiles that the outline crosses or touches
    pieces_P = _pieces(parts_P)
    part, at = shapely.STRtree(tiles_N[crossed]).query(pieces_P)
    tile = crossed[at]
    area = shapely.area(shapely.intersection(pieces_P[part], tiles_N[tile]))
    np.add.at(share_N, tile, area / shapely.area(tiles_N[tile]))
    rounded_N: NDArray[np.float64] = share_N.round(_DIGITS)
    return rounded_N


def _pieces(shapes_P: NDArray[np.object_]) -> NDArray[np.object_]:
    """Shapes cut in halves until each has few corners: an intersection takes time for every corner of both."""
    done = [shapes_P[:0]]
    while len(shapes_P):
        many = shapely.get_num_coordinates(shapes_P) > _CORNERS
        done.append(shapes_P[~many])
        shapes_P = shapes_P[many]
        x0, y0, x1, y1 = shapely.bounds(shapes_P).reshape(-1, 4).T
        wide = x1 - x0 > y1 - y0
        x, y = np.where(wide, (x0 + x1) / 2, x0), np.where(wide, y0, (y0 + y1) / 2)
        first = shapely.intersection(shapes_P, shapely.box(x0, y0, np.where(wide, x, x1), np.where(wide, y1, y)))
        second = shapely.intersection(shapes_P, shapely.box(x, y, x1, y1))
        shapes_P = shapely.get_parts(np.concatenate([first, second]))
    return np.concatenate(done)
