"""Made-up tissue: reproducible, laid out as the published sets are, solved by structure and not by colour."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from ca2cl.data.synthetic.painting import STAINS, cells, noise, ramp, render, stamp, strands
from ca2cl.data.synthetic.tissue import CLASSES, draw_tile, write_tissue
from ca2cl.errors import InputError
from tests.support.gland_images import draw_glands, write_glands

Vector = npt.NDArray[np.float64]


def histogram(tile: npt.NDArray[np.uint8]) -> Vector:
    """32 bins a channel."""
    return np.concatenate([np.bincount(tile[..., c].ravel() // 8, minlength=32) for c in range(3)]) / tile[..., 0].size


def structure(tile: npt.NDArray[np.uint8]) -> Vector:
    """Grey-level structure without colour, brightness or contrast: power spectrum, local binary patterns, coherence."""
    grey = tile.mean(-1)
    grey = (grey - grey.mean()) / (grey.std() + 1e-6)
    fy, fx = np.fft.fftfreq(grey.shape[0])[:, None], np.fft.fftfreq(grey.shape[1])
    rings = np.digitize(np.hypot(fy, fx), np.geomspace(1 / 96, 0.5, 14)).ravel()
    power = np.bincount(rings, (np.abs(np.fft.fft2(grey)) ** 2).ravel(), 15)[1:14]
    patterns = []
    for step in (1, 2, 4):
        g = grey[::step, ::step]
        middle, (h, w) = g[1:-1, 1:-1], g.shape
        ring = [(0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0)]
        bits = np.stack([g[y : h - 2 + y, x : w - 2 + x] > middle for y, x in ring])
        uniform = (bits != np.roll(bits, 1, 0)).sum(0) <= 2
        patterns.append(np.bincount(np.where(uniform, bits.sum(0), 9).ravel(), minlength=10) / middle.size)
    dy, dx = np.gradient(grey)
    coherence = np.hypot((dx**2 - dy**2).mean(), (2 * dx * dy).mean()) / (dx**2 + dy**2).mean()
    return np.concatenate([np.log(power + 1), *patterns, [coherence]])


@pytest.fixture(scope="module")
def tiles() -> dict[str, tuple[list[npt.NDArray[np.uint8]], Vector]]:
    def draw(first: int, count: int) -> tuple[list[npt.NDArray[np.uint8]], Vector]:
        drawn = [draw_tile(label, first + n) for label in CLASSES for n in range(count)]
        return drawn, np.repeat(np.arange(len(CLASSES)), count)

    return {"train": draw(0, 60), "test": draw(1 << 32, 30)}


def accuracy(tiles: dict[str, tuple[list[npt.NDArray[np.uint8]], Vector]], feature: object) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    assert callable(feature)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    (x, y), (x_test, y_test) = tiles["train"], tiles["test"]
    model.fit([feature(t) for t in x], y)
    return float(model.score([feature(t) for t in x_test], y_test))


def test_colour_histogram_does_not_solve_it(tiles) -> None:
    assert 1.5 / 9 < accuracy(tiles, histogram) < 0.5


def test_structure_solves_it(tiles) -> None:
    assert accuracy(tiles, structure) > 0.9


def test_mean_colour_is_the_same_in_every_class(tiles) -> None:
    drawn, labels = tiles["train"]
    colours = np.array([t.mean((0, 1)) for t in drawn])
    means = np.array([colours[labels == k].mean(0) for k in range(len(CLASSES))])
    spread = np.mean([colours[labels == k].std(0) for k in range(len(CLASSES))], axis=0)
    assert np.all(np.ptp(means, axis=0) < spread)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[npt.NDArray[np.uint8]], Vector]]:
    """As the quickstart draws them, smaller and fewer: other slides for testing."""

    def draw(name: str, count: int, seed: int) -> tuple[list[npt.NDArray[np.uint8]], Vector]:
        root = write_tissue(tmp_path_factory.mktemp("slides") / name, count, size=48, seed=seed, slides=count // 2)
        drawn = [np.asarray(Image.open(path)) for label in CLASSES for path in sorted((root / label).iterdir())]
        return drawn, np.repeat(np.arange(len(CLASSES)), count)

    return {"train": draw("train", 30, 0), "test": draw("test", 20, 1)}


def test_colour_tells_little_on_other_slides_and_structure_much(slides) -> None:
    """Chance is .111; colour gets about .2 by either classifier, because the stains of test slides are new."""
    from sklearn.neighbors import KNeighborsClassifier

    (x, y), (x_test, y_test) = slides["train"], slides["test"]
    near = KNeighborsClassifier(20).fit([histogram(t) for t in x], y)
    assert accuracy(slides, histogram) < 0.25
    assert near.score([histogram(t) for t in x_test], y_test) < 0.3
    assert accuracy(slides, structure) > 0.8


def test_files_name_slides_that_no_other_seed_has(tmp_path: Path) -> None:
    names = {
        seed: [p.name for p in write_tissue(tmp_path / f"{seed}", 5, 16, seed, slides=2).rglob("*.png")]
        for seed in (0, 3)
    }
    assert {name[:6] for name in names[0]} == {"S0000-", "S0001-"}
    assert {name[:6] for name in names[3]} == {"S3000-", "S3001-"}
    with pytest.raises(InputError, match="slides=1001; give 0 to 1000"):
        write_tissue(tmp_path / "a", 1, slides=1001)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(CLASSES), st.integers(0, 2**40), st.sampled_from([16, 33, 64, 96]))
def test_a_tile_is_a_pure_function_of_its_arguments(label: str, seed: int, size: int) -> None:
    first = draw_tile(label, seed, size)
    np.random.seed(seed % 1000)  # the global stream must not matter
    assert first.shape == (size, size, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, draw_tile(label, seed, size))
    assert not np.array_equal(first, draw_tile(label, seed + 1, size))


def test_tiles_are_neither_black_nor_white_nor_flat() -> None:
    for label in CLASSES:
        tile = draw_tile(label, 7)
        assert 60 < tile.mean() < 230
        assert tile.std((0, 1)).min() > 4


def test_tree_is_laid_out_as_the_published_set(tmp_path: Path) -> None:
    root = write_tissue(tmp_path / "nct", 3, size=32, suffix=".tif")
    assert sorted(p.name for p in root.iterdir()) == list(CLASSES)
    for label in CLASSES:
        names = sorted(p.stem for p in (root / label).iterdir())
        assert len(set(names)) == 3
        for name in names:
            prefix, code = name.split("-")
            assert prefix == label
            assert len(code) == 8 and code.isalpha() and code.isupper() and code.isascii()
    with Image.open(next((root / "TUM").glob("*.tif"))) as opened:
        assert (opened.format, opened.size, opened.mode, opened.info["compression"]) == ("TIFF", (32, 32), "RGB", "raw")


@pytest.mark.parametrize("suffix", [".tif", ".png", ".bmp", ".webp"])
def test_lossless_files_hold_the_drawn_tiles(tmp_path: Path, suffix: str) -> None:
    root = write_tissue(tmp_path / "a", 2, size=16, seed=5, suffix=suffix)
    read = {np.asarray(Image.open(p)).tobytes() for p in (root / "STR").iterdir()}
    assert read == {draw_tile("STR", (5 << 32) + n, 16).tobytes() for n in range(2)}


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_same_seed_same_bytes_and_another_seed_shares_no_tile_or_name(tmp_path: Path) -> None:
    a, again, other = (contents(write_tissue(tmp_path / n, 4, 16, seed)) for n, seed in [("a", 1), ("b", 1), ("c", 2)])
    assert a == again
    assert not set(a) & set(other)
    assert not set(a.values()) & set(other.values())
    assert len(set(a.values())) == 36


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(InputError, match="not an empty folder"):
        write_tissue(tmp_path / "mine", 1, 16)
    assert contents(tmp_path) == {"mine/notes.txt": b"keep"}


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="size=4"):
        write_tissue(tmp_path / "a", 1, size=4)
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no class 'FAT'"):
        draw_tile("FAT", 0)
    with pytest.raises(InputError, match="seed=-1"):
        draw_tile("ADI", -1)
    with pytest.raises(InputError, match="tiles_per_class=0"):
        write_tissue(tmp_path / "a", 0)
    with pytest.raises(InputError, match=".gif"):
        write_tissue(tmp_path / "a", 1, suffix=".gif")
    with pytest.raises(InputError, match="train=0"):
        write_glands(tmp_path / "a", 0, 1)
    with pytest.raises(InputError, match=".jpg"):
        write_glands(tmp_path / "a", 1, 1, suffix=".jpg")
    with pytest.raises(InputError, match="31x64"):
        draw_glands(0, 31, 64)
    assert list(tmp_path.iterdir()) == []


def test_more_glands_than_a_mask_can_number_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at most 255"):
        write_glands(tmp_path / "glas", 1, 0, 1400, 1400)
    assert list(tmp_path.iterdir()) == []


def touching_pairs(mask: npt.NDArray[np.uint16]) -> int:
    pairs = np.concatenate(
        [
            np.stack([mask[:-1].ravel(), mask[1:].ravel()], 1),
            np.stack([mask[:, :-1].ravel(), mask[:, 1:].ravel()], 1),
        ]
    )
    pairs = np.sort(pairs[(pairs > 0).all(1) & (pairs[:, 0] != pairs[:, 1])], axis=1)
    return len(np.unique(pairs, axis=0))


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**40))
def test_every_gland_is_one_region_with_its_own_number(seed: int) -> None:
    image, mask = draw_glands(seed, 200, 260)
    assert image.shape == (200, 260, 3) and image.dtype == np.uint8
    assert mask.shape == (200, 260) and mask.dtype == np.uint16
    assert sorted(np.unique(mask)) == list(range(int(mask.max()) + 1))
    for number in range(1, int(mask.max()) + 1):
        assert ndimage.label(mask == number)[1] == 1
    again, same = draw_glands(seed, 200, 260)
    assert np.array_equal(image, again) and np.array_equal(mask, same)


def test_glands_touch_and_have_bright_lumens() -> None:
    drawn = [draw_glands(seed, 300, 300) for seed in range(6)]
    assert sum(touching_pairs(mask) for _, mask in drawn) > 6
    for image, mask in drawn:
        assert mask.max() >= 3
        bright = image.min(-1) > 200
        middles = [n for n in range(1, int(mask.max()) + 1) if (mask == n).sum() > 2000]
        with_lumen = sum(bool((bright & (mask == n)).mean() * bright.size > 20) for n in middles)
        assert with_lumen > len(middles) / 2


def test_glands_are_laid_out_as_the_challenge(tmp_path: Path) -> None:
    root = write_glands(tmp_path / "glas", 2, 1, 96, 120, suffix=".bmp")
    stems = ["testA_1", "train_1", "train_2"]
    expected = [f"{stem}{kind}.bmp" for stem in stems for kind in ("", "_anno")] + ["Grade.csv"]
    assert sorted(p.name for p in root.iterdir()) == sorted(expected)
    with (root / "Grade.csv").open(newline="") as stream:
        assert sorted(row["name"] for row in csv.DictReader(stream)) == stems
    image, mask = draw_glands(1, 96, 120)
    assert np.array_equal(np.asarray(Image.open(root / "train_2.bmp")), image)
    anno = np.asarray(Image.open(root / "train_2_anno.bmp"))
    assert anno.dtype == np.uint8 and np.array_equal(anno, mask)


def test_render_is_beer_lambert_pixel_by_pixel() -> None:
    rng = np.random.default_rng(0)
    h, e, light = (rng.random((3, 4)).astype(np.float32) for _ in range(3))
    drawn = render(h, e, light)
    for y in range(3):
        for x in range(4):
            for c in range(3):
                density = float(h[y, x]) * float(STAINS[0, c]) + float(e[y, x]) * float(STAINS[1, c])
                assert abs(int(drawn[y, x, c]) - 250 * float(light[y, x]) * np.exp(-density)) <= 0.51


def test_stamp_is_the_maximum_over_ellipses_and_clips_at_the_border() -> None:
    points, long, turn = (
        np.array([[0.0, 0.5], [5.2, 7.9], [6.0, 9.0]]),
        np.array([3.0, 4.0, 2.5]),
        np.array([0, 0.7, 2]),
    )
    drawn = stamp((9, 11), points, long, 2.0, turn)
    expected = np.zeros((9, 11))
    for (cy, cx), a, angle in zip(points, long, turn, strict=True):
        for y in range(9):
            for x in range(11):
                u = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
                v = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
                rho = np.hypot(u / a, v / 2.0)
                value = min(max((1 - rho) * 2.0 / 1.5 + 0.5, 0), 1) * (0.75 + 0.25 * min(rho, 1))
                expected[y, x] = max(expected[y, x], value)
    np.testing.assert_allclose(drawn, expected, atol=1e-5)


def test_cells_are_the_two_nearest_points_difference() -> None:
    points = np.random.default_rng(1).uniform(-3, 15, (7, 2))
    drawn = cells(points, (10, 12))
    for y in range(10):
        for x in range(12):
            near = sorted(np.hypot(y - py, x - px) for py, px in points)
            assert drawn[y, x] == pytest.approx(near[1] - near[0], abs=1e-4)


def test_noise_is_standardised_and_long_in_its_direction() -> None:
    field = noise(np.random.default_rng(2), (128, 128), 40, 4, 0.0)
    assert abs(field.mean()) < 1e-4 and field.std() == pytest.approx(1, abs=1e-3)
    assert np.abs(np.diff(field, axis=0)).mean() > 4 * np.abs(np.diff(field, axis=1)).mean()


def test_strands_follow_the_level_lines() -> None:
    phase = np.tile(np.linspace(0, 40, 400, dtype=np.float32), (3, 1))
    bands = strands(np.random.default_rng(3), phase)
    assert np.array_equal(bands[0], bands[2])
    assert 0.5 < bands.std() < 2


def test_ramp_is_linear_between_its_ends_either_way_round() -> None:
    value = np.array([-1, 0, 0.25, 1, 2], np.float32)
    np.testing.assert_allclose(ramp(value, 0, 1), [0, 0, 0.25, 1, 1])
    np.testing.assert_allclose(ramp(value, 1, 0), [1, 1, 0.75, 0, 0])
