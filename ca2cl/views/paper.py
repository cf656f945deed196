"""The ``ca2cl`` recipe: the paper's strong and weak view (docs/mathematics.md).

What an operation's setting means follows the conventions of 8-bit image augmentation: a limit is the end of a uniform
range, brightness is added, contrast multiplies, and of a one-of each member is as likely. Order: flips, brightness and
contrast, blur or noise, distortion, CLAHE, hue-saturation-value, shift-scale-rotate, cut-out. Geometry commutes with
point-wise colour, so all of it is read at once, at the start, reflecting at the border; the zero border that
shift-scale-rotate draws is laid over the finished colours. Blur and noise therefore act on the view's own pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ca2cl.views.draw import maps
from ca2cl.views.draw.random import Draws, Floats
from ca2cl.views.draw.table import GAUSSIAN, GRID, MEDIAN, MOTION, NO_BEND, NOISE, OPTICAL, Passes, Table, View, plain

_BLURS = np.array((MOTION, MEDIAN, GAUSSIAN, NOISE))
_BENDS = np.array((OPTICAL, GRID, NO_BEND))
_ELASTIC = 2  # third of the distortions; its bend is an affine map
_NOISE_VARIANCE = (5.0, 30.0)
_CLAHE_CLIP = (1.0, 4.0)
_SHIFT, _SCALE, _DEGREES = 0.1, 0.1, 15.0
_BRIGHTNESS = _CONTRAST = 0.2
_HUE, _SATURATION, _VALUE = 10.0, 20.0, 10.0
_CUTOUT = 0.375
# Three points of the elastic transform move by up to 50 pixels of 224, in units of half a side. Its random field moves
# a pixel by 0.01 after a filter of deviation 50, a third of the step that OpenCV reads at, and is left out.
_ELASTIC_MOVE = 2.0 * 50.0 / 224.0
_LEAST_AREA = 0.01
_GRID_AXES = tuple(f"grid.{axis}.{cell}" for axis in "xy" for cell in range(5))
_MOVES = tuple(f"elastic.move.{number}" for number in range(6))


@dataclass(frozen=True)
class Probabilities:
    """How likely each operation of one view is."""

    transpose: float = 0.5
    vertical: float = 0.5
    horizontal: float = 0.5
    brightness: float = 0.75
    contrast: float = 0.75
    hsv: float = 0.5
    shift_scale_rotate: float = 0.5
    blur: float = 0.0
    distortion: float = 0.0
    clahe: float = 0.0
    cutout: float = 0.0


WEAK = Probabilities()
STRONG = Probabilities(shift_scale_rotate=0.85, blur=0.7, distortion=0.4, clahe=0.7, cutout=0.7)


class PaperRecipe:
    """The paper's two views.

    Args:
        size: side of the views in pixels.
        strong: how likely the operations of the strong view are.
        weak: the same for the weak view.
    """

    name = "ca2cl"
    draw_names = (
        *vars(WEAK), "brightness.by", "contrast.by", "hue", "saturation", "value", "shift.x", "shift.y", "scale",
        "rotate", "blur.which", "blur.wide", "motion.x", "motion.to.x", "motion.y", "motion.to.y", "noise.variance",
        "noise", "distortion.which", "optical", *_GRID_AXES, *_MOVES, "clahe.clip", "cutout.y", "cutout.x",
    )  # fmt: skip

    def __init__(self, size: int, *, strong: Probabilities = STRONG, weak: Probabilities = WEAK) -> None:
        self.size = size
        self.likely = {"strong": strong, "weak": weak}

    def passes(self, view: View) -> Passes:
        """What some tile of a view may draw."""
        likely = self.likely[view]
        return Passes(stain=False, blur=likely.blur > 0, clahe=likely.clahe > 0)

    def draw(self, draws: Draws, views: Sequence[View], tile_sides: tuple[int, int]) -> Table:
        """The rows of some views, (V, B); their tiles are of (height, width) pixels."""
        names = vars(WEAK)
        on = {
            name: draws.chance(name, np.array([[getattr(self.likely[view], name)] for view in views])) for name in names
        }
        table = plain(*on["blur"].shape)
        table["reduce"] = max(1, min(tile_sides) // self.size)
        self._draw_geometry(draws, on, table)
        added = on["brightness"] * draws.uniform("brightness.by", -_BRIGHTNESS, _BRIGHTNESS)
        factor = 1.0 + on["contrast"] * draws.uniform("contrast.by", -_CONTRAST, _CONTRAST)
        # Held in range before the factor, too: no more than the factor can come out.
        table["adjust"] = np.stack((factor, factor * added * 255.0, np.minimum(factor, 1.0) * 255.0), -1)
        self._draw_blur(draws, on["blur"], table)
        area = (-(-self.size // 8)) ** 2
        table["clip"] = on["clahe"] * np.maximum(np.floor(draws.uniform("clahe.clip", *_CLAHE_CLIP) * area / 256), 1.0)
        table["shifted"] = on["hsv"]
        hue, saturation = draws.uniform("hue", -_HUE, _HUE), draws.uniform("saturation", -_SATURATION, _SATURATION)
        table["hsv"] = np.stack((hue / 30.0, saturation / 255.0, draws.uniform("value", -_VALUE, _VALUE) / 255.0), -1)
        # About a pixel drawn anywhere, moved in at the top and left.
        side = int(self.size * _CUTOUT)
        top, left = (np.maximum(draws.choice(f"cutout.{axis}", self.size) - side // 2, 0) for axis in "yx")
        table["hole"] = np.stack((top, left, on["cutout"] * side), -1)
        return table

    def _draw_geometry(self, draws: Draws, on: dict[str, npt.NDArray[np.bool_]], table: Table) -> None:
        turned = table["border"] = on["shift_scale_rotate"].astype(np.float64)
        table["affine"] = maps.shift_scale_rotate(
            turned * draws.uniform("shift.x", -_SHIFT, _SHIFT), turned * draws.uniform("shift.y", -_SHIFT, _SHIFT),
            1.0 + turned * draws.uniform("scale", -_SCALE, _SCALE),
            turned * draws.uniform("rotate", -_DEGREES, _DEGREES),
        )  # fmt: skip
        which = draws.choice("distortion.which", len(_BENDS))
        table["bend"] = on["distortion"] * _BENDS[which]
        table["optical"] = draws.uniform("optical", -1.0, 1.0)
        steps = _stacked(draws, _GRID_AXES, 0.0, 2.0)
        table["grid_x"], table["grid_y"] = steps[..., :5], steps[..., 5:]
        moves = (
            _stacked(draws, _MOVES, -_ELASTIC_MOVE, _ELASTIC_MOVE) * (on["distortion"] & (which == _ELASTIC))[..., None]
        )
        elastic = maps.inverse(maps.three_points(moves.reshape(*which.shape, 3, 2)), _LEAST_AREA)
        table["turn"] = maps.then(elastic, maps.dihedral(on["transpose"], on["vertical"], on["horizontal"]))

    def _draw_blur(self, draws: Draws, on: npt.NDArray[np.bool_], table: Table) -> None:
        kind = _BLURS[draws.choice("blur.which", len(_BLURS))]
        table["blur"] = on * kind
        # A Gaussian kernel's size is drawn from 3, 4 and 5 and made odd upwards, the others' from 3 and 5.
        radius = 1 + draws.chance("blur.wide", np.where(kind == GAUSSIAN, 2 / 3, 1 / 2))
        table["radius"] = radius
        # That of a kernel whose size alone is given: 0.3 ((taps - 1) / 2 - 1) + 0.8.
        table["sigma"] = 0.3 * (radius - 1) + 0.8
        # A line between two pixels of the kernel, which are not the same.
        x, to_x, y, to_y = (
            np.floor(draws.uniform(f"motion.{end}") * (2 * radius + 1)) for end in ("x", "to.x", "y", "to.y")
        )
        other = (y + 1 + np.floor(draws.uniform("motion.to.y") * 2 * radius)) % (2 * radius + 1)
        to_y = np.where(x == to_x, other, to_y)
        table["line"] = np.stack((y, x, to_y, to_x), -1) - radius[..., None]
        table["deviation"] = np.sqrt(draws.uniform("noise.variance", *_NOISE_VARIANCE))
        table["noise"] = draws.choice("noise", 1 << 24)


def _stacked(draws: Draws, names: Sequence[str], low: float, high: float) -> Floats:
    return np.stack([draws.uniform(name, low, high) for name in names], -1)
