"""Search for copies of tiles among other tiles by their thumbnails.

Candidates are found by coarse descriptors, in all orientations and shifts, and kept if the thumbnails correlate. Large
sets are divided into cells by k-means, and a query looks into the cells nearest to it (an inverted file; Sivic and
Zisserman, ICCV 2003).

Legend: N queries, M known tiles, V views of a query, D length of a descriptor, C cells, P pairs, S side of a thumbnail.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ca2cl.common.console.progress import ProgressBar
from ca2cl.data.fingerprints.alignment import correlations
from ca2cl.data.fingerprints.thumbnails import COARSE, OFFSETS, ORIENTATIONS, descriptors, is_flat, oriented, turned

CANDIDATE = 0.85
"""Least cosine of the descriptors of a candidate."""
COPY = 0.8
"""Least correlation of the thumbnails of a copy."""
_NEAREST = 3
"""Candidates of each view of a query."""
_PROBES = 6
"""Cells that a view looks into."""
_ONE_CELL = 8192
_ROUNDS = 6
_SEED = 0


@dataclass(frozen=True)
class Copies:
    """Pairs of a query and a known tile that show the same tissue; best first for each query, queries ascending."""

    query_P: npt.NDArray[np.int64]
    known_P: npt.NDArray[np.int64]
    orientation_P: npt.NDArray[np.int64]
    """Of the query, that makes it like the known tile."""
    correlation_P: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.query_P)


class Known:
    """Known tiles, divided into cells.

    Args:
        thumbnails_MSS: uint8; flat tiles are no copies of any.
        device: where descriptors are compared.
    """

    def __init__(self, thumbnails_MSS: Tensor, device: torch.device) -> None:
        self.thumbnails, self.device = thumbnails_MSS, device
        rows_M = torch.nonzero(~is_flat(thumbnails_MSS)).flatten()
        vectors_MD = torch.cat([descriptors(thumbnails_MSS[part], COARSE) for part in torch.split(rows_M, 8192)])
        self.cells_CD = _centroids(vectors_MD, _cells(len(vectors_MD))).to(device)
        cell_M = torch.cat(
            [(part.to(device) @ self.cells_CD.T).argmax(1).cpu() for part in torch.split(vectors_MD, 16384)] or []
        )
        order_M = torch.argsort(cell_M, stable=True)
        self.rows, self.vectors = rows_M[order_M], vectors_MD[order_M].to(device)
        self.starts = [0, *torch.bincount(cell_M, minlength=len(self.cells_CD)).cumsum(0).tolist()]

    def candidates(self, thumbnails_NSS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, known tile and orientation (P,) of candidates; the same pair may come more than once."""
        views_ND = _views(thumbnails_NSS.to(self.device))
        probes = min(_PROBES, len(self.cells_CD))
        cell_NP = torch.cat([(part @ self.cells_CD.T).topk(probes, 1).indices for part in torch.split(views_ND, 8192)])
        order = torch.argsort(cell_NP.flatten(), stable=True)
        bounds = [0, *torch.bincount(cell_NP.flatten(), minlength=len(self.cells_CD)).cumsum(0).tolist()]
        found: list[tuple[Tensor, Tensor]] = []
        for cell in range(len(self.cells_CD)):
            members = slice(self.starts[cell], self.starts[cell + 1])
            asking = order[bounds[cell] : bounds[cell + 1]] // probes
            if members.start == members.stop or not len(asking):
                continue
            for some in torch.split(asking, 4096):
                found.append(self._near(views_ND, some, members))
        view_P = torch.cat([view for view, _ in found]).cpu()
        known_P = self.rows[torch.cat([row for _, row in found]).cpu()]
        per_orientation = len(OFFSETS) * len(thumbnails_NSS)
        return view_P % len(thumbnails_NSS), known_P, view_P // per_orientation

    def _near(self, views_ND: Tensor, some: Tensor, members: slice) -> tuple[Tensor, Tensor]:
        """Views among ``some``, and rows of ``vectors``, of the pairs that are near."""
        cosines = views_ND[some] @ self.vectors[members].T
        hit = torch.nonzero(cosines.amax(1) >= CANDIDATE).flatten()
        best = cosines[hit].topk(min(_NEAREST, cosines.shape[1]), 1)
        view, place = torch.nonzero(best.values >= CANDIDATE, as_tuple=True)
        return some[hit[view]], best.indices[view, place] + members.start


def find_copies(
    thumbnails_NSS: Tensor, known: Known, *, block: int = 1024, title: str | None = None
) -> Copies:  # fmt: skip
    """Find the copies of each query among known tiles.

    Args:
        thumbnails_NSS: of the queries, uint8.
        known: what they are looked for in.
        block: queries at a time.
        title: of the progress bar; None shows none.
    """
    parts = []
    rows_N = torch.nonzero(~is_flat(thumbnails_NSS)).flatten()
    with ProgressBar(total=len(thumbnails_NSS), desc=title, unit="tile", disable=not title) as bar:
        bar.update(len(thumbnails_NSS) - len(rows_N))
        for some in torch.split(rows_N, block) if len(known.rows) else ():
            query_P, known_P, orientation_P = known.candidates(thumbnails_NSS[some])
            parts.append(_verified(thumbnails_NSS, known, some[query_P], known_P, orientation_P))
            bar.update(len(some))
    return _joined(parts)


def _views(thumbnails_NSS: Tensor) -> Tensor:
    """Coarse descriptors (V * N, D) of all orientations and windows; those of one view lie together."""
    windows = torch.cat([descriptors(thumbnails_NSS, COARSE, offset) for offset in OFFSETS])
    return torch.cat([oriented(windows, COARSE, orientation) for orientation in range(ORIENTATIONS)])


def _verified(
    thumbnails_NSS: Tensor, known: Known, query_P: Tensor, known_P: Tensor, orientation_P: Tensor
) -> Tensor:  # fmt: skip
    """Rows (query, known tile, orientation, correlation) of double precision, of candidates that correlate."""
    unique = torch.unique(torch.stack([query_P, known_P, orientation_P], 1), dim=0)
    rows = []
    for orientation in range(ORIENTATIONS):
        for some in torch.split(unique[unique[:, 2] == orientation], 512):
            if not len(some):  # which MKL's transforms refuse
                continue
            first = known.thumbnails[some[:, 1]].to(known.device)
            second = turned(thumbnails_NSS[some[:, 0]].to(known.device), orientation)
            rows.append(torch.cat([some.double(), correlations(first, second).cpu().double()[:, None]], 1))
    scored = torch.cat(rows) if rows else torch.zeros(0, 4, dtype=torch.float64)
    return scored[scored[:, 3] >= COPY]


def _joined(parts: list[Tensor]) -> Copies:
    """The best orientation of every pair."""
    rows = torch.cat(parts).numpy() if parts else np.zeros((0, 4))
    rows = rows[np.lexsort((-rows[:, 3], rows[:, 0]))]
    _, first = np.unique(rows[:, :2], axis=0, return_index=True)
    rows = rows[np.sort(first)]
    query, known, orientation = (rows[:, column].astype(np.int64) for column in range(3))
    return Copies(query, known, orientation, rows[:, 3].astype(np.float32))


def _cells(tiles: int) -> int:
    """C: one for few tiles; otherwise about twice the root of their number."""
    return 1 if tiles <= _ONE_CELL else 2 ** round(math.log2(2 * math.sqrt(tiles)))


def _centroids(vectors_MD: Tensor, cells: int) -> Tensor:
    """Centroids (C, D) of spherical k-means on a sample."""
    if cells == 1:
        return torch.zeros(1, COARSE.length)
    generator = torch.Generator().manual_seed(_SEED)
    sample = vectors_MD[torch.randperm(len(vectors_MD), generator=generator)[: 32 * cells]]
    centroids = sample[:cells].clone()
    for _ in range(_ROUNDS):
        cell = torch.cat([(part @ centroids.T).argmax(1) for part in torch.split(sample, 16384)])
        sums = torch.zeros_like(centroids).index_add_(0, cell, sample)
        centroids = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums, dim=1), centroids)
    return centroids
