"""Fingerprints: what a copy leaves as it is, and what another tile does not have."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from ca2cl.data.fingerprints import nearest
from ca2cl.data.fingerprints.alignment import _FLOOR, REACH, _blur, correlations
from ca2cl.data.fingerprints.nearest import COPY, Known, find_copies
from ca2cl.data.fingerprints.seen import (
    SEEN_NAME,
    Seen,
    SeenShards,
    fingerprints_of,
    group_word,
    merged,
    pixel_word,
    read_seen,
    write_seen,
)
from ca2cl.data.fingerprints.survey import digest_of
from ca2cl.data.fingerprints.thumbnails import (
    COARSE,
    FINE,
    ORIENTATIONS,
    SIDE,
    descriptors,
    is_flat,
    oriented,
    thumbnails,
    turned,
)
from ca2cl.errors import InputError

CPU = torch.device("cpu")


def tissue(count: int, side: int, seed: int) -> np.ndarray:
    """Smooth noise in two colours, uint8 (count, side, side, 3): structure at several scales."""
    generator = np.random.default_rng(seed)
    fields = sum(gaussian_filter(generator.normal(size=(count, side, side)), (0, s, s)) * s for s in (2, 5, 12))
    share = 1 / (1 + np.exp(-2 * fields / fields.std()))[..., None]
    return (share * (90, 50, 140) + (1 - share) * (235, 190, 220)).astype(np.uint8)


def re_encoded(tiles: np.ndarray, quality: int) -> np.ndarray:
    out = []
    for tile in tiles:
        held = io.BytesIO()
        Image.fromarray(tile).save(held, "JPEG", quality=quality)
        out.append(np.asarray(Image.open(held)))
    return np.stack(out)


def thumbs(tiles: np.ndarray) -> Tensor:
    return thumbnails(torch.from_numpy(np.ascontiguousarray(tiles)))


@pytest.mark.parametrize("orientation", range(ORIENTATIONS))
def test_an_orientation_of_the_descriptor_is_that_of_the_tile(orientation: int) -> None:
    small = thumbs(tissue(3, 112, 0))
    for form in (COARSE, FINE):
        torch.testing.assert_close(
            oriented(descriptors(small, form), form, orientation),
            descriptors(turned(small, orientation), form),
            atol=1e-5,
            rtol=0,
        )


def test_descriptors_are_cosine_sums() -> None:
    small = thumbs(tissue(1, 112, 0))
    window = small[0, 2:-2, 2:-2].double().numpy() - 128
    side = len(window)
    sums = []
    for row in range(COARSE.size):
        for column in range(COARSE.size):
            total = 0.0
            for y in range(side):
                for x in range(side):
                    total += (
                        window[y, x]
                        * np.cos(np.pi * row * (y + 0.5) / side)
                        * np.cos(np.pi * column * (x + 0.5) / side)
                    )
            scale = (1 if row else 0.5**0.5) * (1 if column else 0.5**0.5)
            sums.append(total * scale * (row**2 + column**2) ** (COARSE.slope / 2))
    expected = np.array(sums[1:]) / np.linalg.norm(sums[1:])
    np.testing.assert_allclose(descriptors(small, COARSE)[0].numpy(), expected, atol=1e-5)


def evened(picture: np.ndarray) -> np.ndarray:
    """A picture less its blur, each pixel divided by the deviation around it."""
    weight = _blur()
    levels = picture.astype(np.float64) - 128
    fine, even = np.zeros_like(levels), np.zeros_like(levels)
    for place in np.ndindex(levels.shape):
        around = weight[place[0]][:, None] * weight[place[1]]
        fine[place] = levels[place] - (around * levels).sum()
    for place in np.ndindex(levels.shape):
        around = weight[place[0]][:, None] * weight[place[1]]
        even[place] = fine[place] / ((around * fine**2).sum() ** 0.5 + _FLOOR)
    return even


def test_correlations_are_pearsons_at_the_best_shift() -> None:
    tiles = tissue(2, SIDE, 1)
    first, second = thumbs(tiles[:1]), thumbs(np.concatenate([tiles[1:, 3:], tiles[1:, :3]], axis=1))
    a, b = (evened(x[0].numpy()) for x in (first, second))
    best = -1.0
    for down in range(-REACH, REACH + 1):
        for right in range(-REACH, REACH + 1):
            mine = a[max(0, -down) : SIDE - max(0, down), max(0, -right) : SIDE - max(0, right)]
            other = b[max(0, down) : SIDE + min(0, down), max(0, right) : SIDE + min(0, right)]
            best = max(best, float(np.corrcoef(mine.ravel(), other.ravel())[0, 1]))
    assert correlations(first, second)[0] == pytest.approx(best, abs=1e-4)


def test_altered_copies_are_found_and_other_tiles_are_not() -> None:
    tiles, others = tissue(12, 232, 2), tissue(12, 224, 3)
    at = slice(0, 224)
    changed = {
        "jpeg": re_encoded(tiles[:, at, at], 50),
        "stain": (255 * (tiles[:, at, at] / 255) ** np.array([0.7, 1.3, 0.8])).astype(np.uint8),
        "mirrored": tiles[:, at, at][:, :, ::-1],
        "turned": np.rot90(tiles[:, at, at], 1, (1, 2)),
        "shifted": tiles[:, 8:, 8:],
        "all of it": re_encoded(np.rot90(tiles[:, 8:, 8:], 3, (1, 2)), 60),
    }
    known = Known(thumbs(np.concatenate([tiles[:, at, at], others])), CPU)
    for name, copies in changed.items():
        found = find_copies(thumbs(copies), known)
        assert found.query_P.tolist() == found.known_P.tolist() == list(range(12)), name
    assert len(find_copies(thumbs(tissue(12, 224, 4)), known)) == 0
    marked = [int(o) for o in find_copies(thumbs(changed["turned"]), known).orientation_P]
    back = [turned(thumbs(changed["turned"])[k : k + 1], o)[0] for k, o in enumerate(marked)]
    assert all(int((b.int() - a.int()).abs().max()) <= 1 for a, b in zip(known.thumbnails, back, strict=False))


def test_a_common_edge_does_not_make_copies() -> None:
    """Different tissue on both sides of a lumen at the same place, of which the lumen is most of the contrast."""
    tiles = tissue(2, 224, 8) // 3
    tiles[:, :, 100:120] = 235
    first, second = thumbs(tiles)
    assert correlations(first[None], second[None])[0] < COPY - 0.1
    assert correlations(first[None], thumbs(re_encoded(tiles[:1], 50)))[0] > 0.9


def test_tiles_without_structure_are_copies_of_none() -> None:
    blank = np.full((3, 64, 64, 3), 240, np.uint8)
    blank[1] -= np.random.default_rng(0).integers(0, 4, (64, 64, 3), np.uint8)
    small = thumbs(blank)
    assert is_flat(small).all() and not fingerprints_of(small).any()
    assert len(find_copies(small, Known(small, CPU))) == 0


def test_cells_find_what_all_comparisons_find(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = tissue(300, 56, 5)
    small, copies = thumbs(tiles), thumbs(re_encoded(tiles[::3], 70)[:, ::-1])
    whole = find_copies(copies, Known(small, CPU), block=64)
    monkeypatch.setattr(nearest, "_ONE_CELL", 100)
    known = Known(small, CPU)
    assert len(known.cells_CD) > 30
    cells = find_copies(copies, known, block=64)
    assert list(zip(whole.query_P, whole.known_P, strict=True)) == [(k, 3 * k) for k in range(100)]
    assert list(zip(cells.query_P, cells.known_P, strict=True)) == [(k, 3 * k) for k in range(100)]


def seen_of(tiles: np.ndarray, digest: str = "1", groups: tuple[str, ...] = ()) -> Seen:
    words = [pixel_word(digest_of(tile)) for tile in tiles]
    return Seen(
        (SeenShards(digest, len(tiles), len(tiles)),),
        np.unique(np.array([group_word(name) for name in groups], np.uint64)),
        np.unique(np.array(words, np.uint64)),
        fingerprints_of(thumbs(tiles)),
    )


def test_seen_tiles_are_found_by_name_by_pixels_and_as_copies(tmp_path: Path) -> None:
    tiles = tissue(20, 112, 6)
    write_seen(tmp_path, seen_of(tiles[:10], groups=("b", "a")))
    seen = read_seen(tmp_path)
    assert seen is not None and seen.manifests == ("1",)
    assert seen.has_groups(["a", None, "c", "b"]).tolist() == [True, False, False, True]
    assert seen.has_pixels([digest_of(tile) for tile in tiles]).tolist() == [True] * 10 + [False] * 10
    altered = fingerprints_of(thumbs(re_encoded(np.rot90(tiles, 1, (1, 2)), 80)))
    assert seen.has_copies(altered).tolist() == [True] * 10 + [False] * 10


def test_what_was_seen_twice_counts_once() -> None:
    tiles = tissue(6, 56, 7)
    first, second = seen_of(tiles[:3], "1", ("a",)), seen_of(tiles[3:], "2", ("b",))
    both = merged([first, None, second, first])
    assert both is not None and both.manifests == ("1", "2")
    assert len(both.pixels_P) == len(both.fingerprints_ND) == 6 and both.has_groups(["a", "b"]).all()
    assert merged([None]) is None


def test_a_damaged_file_is_refused_and_an_old_one_removed(tmp_path: Path) -> None:
    assert read_seen(tmp_path) is None
    (tmp_path / SEEN_NAME).write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"seen.safetensors: damaged .*remove it"):
        read_seen(tmp_path)
    write_seen(tmp_path, None)
    assert not (tmp_path / SEEN_NAME).exists()
