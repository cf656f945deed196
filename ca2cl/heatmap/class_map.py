"""Average the scores of tiles over the area that they cover.

Legend: N tiles, K classes, X columns and Y rows of cells, W and H pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_DIGITS = 6
"""Of level-0 pixels: edges of neighbouring tiles are the same number then."""
_SCORE_DIGITS = 9
"""Equal votes stay equal, whatever the order of the sums."""


@dataclass(frozen=True)
class ClassMap:
    """Means over tiles, constant within each cell between neighbouring edges of tiles.

    Attributes:
        x_edges: X + 1 edges in level-0 pixels, ascending.
        y_edges: Y + 1 edges.
        scores_YXK: mean score of the tiles that cover a cell; 0 if none does.
        covered_YX: True where one does.
    """

    x_edges: Floats
    y_edges: Floats
    scores_YXK: Floats
    covered_YX: npt.NDArray[np.bool_]

    @property
    def classes_YX(self) -> npt.NDArray[np.int64]:
        """Class with the highest mean score, the first of equals; -1 where no tile is."""
        return np.where(self.covered_YX, self.scores_YXK.argmax(axis=2), -1)

    def cells(self) -> tuple[Floats, npt.NDArray[np.int64], Floats]:
        """Boxes ``x0, y0, x1, y1`` of the covered cells, (M, 4), their classes (M,) and mean scores (M, K)."""
        y, x = np.nonzero(self.covered_YX)
        boxes_M4 = np.stack([self.x_edges[x], self.y_edges[y], self.x_edges[x + 1], self.y_edges[y + 1]], axis=1)
        return boxes_M4, self.classes_YX[y, x], self.scores_YXK[y, x]

    def shares(self) -> Floats:
        """Each class's share of the covered area, (K,)."""
        area_YX = np.outer(np.diff(self.y_edges), np.diff(self.x_edges))
        classes_YX = self.classes_YX
        areas_K = [area_YX[classes_YX == k].sum() for k in range(self.scores_YXK.shape[2])]
        return np.asarray(np.asarray(areas_K) / area_YX[self.covered_YX].sum(), np.float64)

    def sampled(self, width: int, height: int, scale: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Row and column of the cell at each pixel's centre, (H, W, 2), and whether a tile covers it, (H, W).

        Args:
            width, height: of a picture of the slide from its left upper corner.
            scale: level-0 pixels to a pixel of the picture.
        """
        places = []
        inside = []
        for edges, count in ((self.y_edges, height), (self.x_edges, width)):
            place = np.searchsorted(edges, (np.arange(count) + 0.5) * scale, side="right") - 1
            inside.append((place >= 0) & (place < len(edges) - 1))
            places.append(place.clip(0, len(edges) - 2))
        cells_HW2 = np.stack(np.meshgrid(*places, indexing="ij"), axis=-1)
        within_HW = np.logical_and.outer(*inside)
        return cells_HW2, within_HW & self.covered_YX[cells_HW2[..., 0], cells_HW2[..., 1]]


def average(boxes_N4: Floats, scores_NK: Floats) -> ClassMap:
    """The mean score at every place of the tiles that cover it.

    Each tile adds its scores to the rectangle of cells between its edges: at four corners of an array of differences,
    of which running sums then make the rectangles.

    Args:
        boxes_N4: ``x0, y0, x1, y1`` in level-0 pixels.
        scores_NK: of the tiles.
    """
    boxes_N4 = boxes_N4.round(_DIGITS)
    x_edges, x_2N = _edges(boxes_N4[:, [0, 2]])
    y_edges, y_2N = _edges(boxes_N4[:, [1, 3]])
    sums_YXK = _rectangles(x_2N, y_2N, scores_NK, (len(y_edges), len(x_edges)))
    counts_YX = _rectangles(x_2N, y_2N, np.ones((len(boxes_N4), 1)), (len(y_edges), len(x_edges)))[..., 0].round()
    covered_YX = counts_YX > 0
    means_YXK = sums_YXK / np.maximum(counts_YX, 1)[..., None]
    scores_YXK = np.where(covered_YX[..., None], means_YXK.round(_SCORE_DIGITS), 0)
    return ClassMap(x_edges, y_edges, scores_YXK, covered_YX)


def _edges(sides_N2: Floats) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Distinct edges, and the places among them of first and last edges, (2, N)."""
    edges, places = np.unique(sides_N2, return_inverse=True)
    return edges, places.reshape(sides_N2.shape).T


def _rectangles(
    x_2N: npt.NDArray[np.int64], y_2N: npt.NDArray[np.int64], values_NK: Floats, edges: tuple[int, int]
) -> Floats:
    """Sum of the values of the rectangles that cover a cell, (Y, X, K)."""
    differences = np.zeros((*edges, values_NK.shape[1]))
    for y, x, sign in ((0, 0, 1), (0, 1, -1), (1, 0, -1), (1, 1, 1)):
        np.add.at(differences, (y_2N[y], x_2N[x]), sign * values_NK)
    return differences.cumsum(axis=0).cumsum(axis=1)[:-1, :-1]
