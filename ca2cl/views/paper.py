"""The ``ca2cl`` recipe: the paper's strong and weak view (docs/mathematics.md).

What an operation's setting means follows the conventions of 8-bit image augmentation: a limit is the end of a uniform
range, brightness is added, contrast multiplies, and of a one-of each member is as likely. Order: flips, brightness and
contrast, blur or noise, distortion, CLAHE, hue-saturation-value, shift-scale-rotate, cut-out. Geometry commutes with
point-wise colour, so all of it is read at once, at the start, reflecting at the border; the zero border that
shift-scale-rotate draws is laid over the finished colours. Blur and noise therefore act on the view's own pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ca2cl.runtime.device import to_device
from ca2cl.views.ops import distort, filters, geometry
from ca2cl.views.ops.clahe import clahe_lightness
from ca2cl.views.ops.hsv import shift_hsv
from ca2cl.views.ops.random import Draws
from ca2cl.views.ops.subset import apply_to, per_sample, rows_of

_BLURS = ("motion", "median", "gaussian", "noise")
_DISTORTIONS = ("optical", "grid", "elastic")
_NOISE_VARIANCE = (5.0, 30.0)  # of 8-bit values
_CLAHE_CLIP = (1.0, 4.0)
_SHIFT, _SCALE, _DEGREES = 0.1, 0.1, 15.0
_BRIGHTNESS = _CONTRAST = 0.2
_HUE, _SATURATION, _VALUE = 10.0, 20.0, 10.0
_CUTOUT = 0.375
# Deviations of Gaussian kernels of 5 and 3 taps when only their size is given: 0.3 ((taps - 1) / 2 - 1) + 0.8.
_SIGMA = (1.1, 0.8)


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

    def __init__(self, size: int, *, strong: Probabilities = STRONG, weak: Probabilities = WEAK) -> None:
        self.size = size
        self._strong, self._weak = strong, weak

    def strong(self, images: Tensor, draws: Draws) -> Tensor:
        """The strong view, float32 (B, 3, S, S) in [0, 1], of tiles float32 (B, 3, H, W) in [0, 1]."""
        return self._view(images, draws, self._strong)

    def weak(self, images: Tensor, draws: Draws) -> Tensor:
        """The weak view, likewise."""
        return self._view(images, draws, self._weak)

    def _view(self, images: Tensor, draws: Draws, likely: Probabilities) -> Tensor:
        turned = draws.chance("shift_scale_rotate", likely.shift_scale_rotate)
        out, border = read(images, draws, likely, turned, self.size)
        adjust(out, draws, likely)
        blur(out, draws, likely)
        clip = draws.uniform("clahe.clip", *_CLAHE_CLIP)
        apply_to(out, draws.chance("clahe", likely.clahe), lambda some, rows: clahe_lightness(some, clip[rows]))
        shift_colours(out, draws, likely)
        apply_to(out, turned, lambda some, _: some.mul_(border))
        cut_out(out, draws, likely)
        return out


def read(images: Tensor, draws: Draws, likely: Probabilities, turned: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """All geometry of a view in one reading of the tile.

    Args:
        images: float32 (B, 3, H, W).
        draws: of this view.
        likely: how likely its operations are.
        turned: bool (B,), which samples are shifted, scaled and rotated.
        size: side S of the view.

    Returns:
        The view, float32 (B, 3, S, S), read with reflection at the border, and for the samples of ``turned`` the share
        of every pixel that lies on the tile, float32 (n, 1, S, S).
    """
    distorted = draws.chance("distortion", likely.distortion)
    flips = [draws.chance(name, getattr(likely, name)) for name in ("transpose", "vertical", "horizontal")]
    dihedral = geometry.dihedral(*flips)
    affine = shift_scale_rotate(draws, turned).then(geometry.dihedral(*(flip & ~distorted for flip in flips)))
    x, y = geometry.affine_grid(affine, size, images.device)
    # Flips keep the square, so the border may be found from flipped coordinates as well as from those before.
    here = to_device(rows_of(turned), images.device)
    border = geometry.coverage(x[here], y[here], size)[:, None]
    for number, name in enumerate(_DISTORTIONS):
        rows = rows_of(distorted & (draws.choice("distortion.which", len(_DISTORTIONS)) == number))
        if len(rows) > 0:
            here = to_device(rows, images.device)
            moved = geometry.move(*_distort(name, x[here], y[here], draws, rows), dihedral.rows(rows))
            x[here], y[here] = moved
    factor = max(1, min(images.shape[-2:]) // size)
    return geometry.sample_reduced(images, [factor] * len(images), x, y), border


def shift_scale_rotate(draws: Draws, mask: Tensor) -> geometry.Affine:
    """The drawn shift, scale and rotation where ``mask`` is set, nothing elsewhere."""
    on = mask.double()
    return geometry.shift_scale_rotate(
        on * draws.uniform("shift.x", -_SHIFT, _SHIFT),
        on * draws.uniform("shift.y", -_SHIFT, _SHIFT),
        1.0 + on * draws.uniform("scale", -_SCALE, _SCALE),
        on * draws.uniform("rotate", -_DEGREES, _DEGREES),
    )


def _distort(name: str, x: Tensor, y: Tensor, draws: Draws, rows: Tensor) -> tuple[Tensor, Tensor]:
    if name == "optical":
        return distort.optical(x, y, distort.draw_optical(draws)[rows])
    if name == "grid":
        return distort.grid(x, y, *(steps[rows] for steps in distort.draw_grid(draws)))
    return distort.elastic(x, y, *(part[rows] for part in distort.draw_elastic(draws)))


def adjust(images: Tensor, draws: Draws, likely: Probabilities) -> None:
    """Brightness added, held in [0, 1], then contrast multiplied, held in [0, 1]; in place, one pass for both."""
    on = draws.chance("brightness", likely.brightness).double()
    added = on * draws.uniform("brightness.by", -_BRIGHTNESS, _BRIGHTNESS)
    on = draws.chance("contrast", likely.contrast).double()
    factor = 1.0 + on * draws.uniform("contrast.by", -_CONTRAST, _CONTRAST)
    scale = per_sample(factor, images)
    images.mul_(scale).add_(per_sample(factor * added, images))
    # Held in [0, 1] before the factor too: no more than the factor can come out.
    torch.minimum(images.clamp_(min=0.0), scale.clamp(max=1.0), out=images)


def blur(images: Tensor, draws: Draws, likely: Probabilities) -> None:
    """One of motion, median and Gaussian blur and Gaussian noise, in place."""
    on, which = draws.chance("blur", likely.blur), draws.choice("blur.which", len(_BLURS))
    wide = draws.chance("blur.wide", 0.5)
    drawn = {name: on & (which == number) for number, name in enumerate(_BLURS)}
    line = torch.where(wide, 4 + draws.choice("motion.line", 8), draws.choice("motion.line", 4))
    apply_to(images, drawn["motion"], lambda some, rows: filters.motion_blur(some, line[rows]))
    apply_to(images, drawn["median"] & ~wide, lambda some, _: filters.median_blur(some, 3))
    apply_to(images, drawn["median"] & wide, lambda some, _: filters.median_blur(some, 5))
    # One kernel of 5 taps serves both sizes: that of 3 taps has zeros at its ends.
    kernels = filters.gaussian_weights(torch.where(wide, *_SIGMA), torch.where(wide, 2, 1), radius=2)
    apply_to(images, drawn["gaussian"], lambda some, rows: filters.symmetric_blur(some, kernels[rows]))
    deviation, words = draws.uniform("noise.variance", *_NOISE_VARIANCE).sqrt() / 255.0, draws.words("noise")
    apply_to(images, drawn["noise"], lambda some, rows: filters.add_noise(some, deviation[rows], words[rows]))


def shift_colours(images: Tensor, draws: Draws, likely: Probabilities) -> None:
    """Shift of hue, saturation and value, in place."""
    hue = draws.uniform("hue", -_HUE, _HUE)
    saturation = draws.uniform("saturation", -_SATURATION, _SATURATION)
    value = draws.uniform("value", -_VALUE, _VALUE)
    apply_to(
        images,
        draws.chance("hsv", likely.hsv),
        lambda some, rows: shift_hsv(some, hue[rows], saturation[rows], value[rows]),
    )


def cut_out(images: Tensor, draws: Draws, likely: Probabilities) -> None:
    """Zero a square of 3/8 of the side about a pixel drawn anywhere, moved in at the top and left; in place."""
    size = images.shape[-1]
    side = int(size * _CUTOUT)
    top, left = ((draws.choice(f"cutout.{axis}", size) - side // 2).clamp(min=0) for axis in "yx")
    for row in rows_of(draws.chance("cutout", likely.cutout)).tolist():
        y, x = int(top[row]), int(left[row])
        images[row, :, y : y + side, x : x + side] = 0.0
