"""Draw a slide beside its map, with legend and scale bar.

Legend: H, W pixels of the thumbnail, X, Y cells of the map, K classes.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ca2cl.heatmap.class_map import ClassMap

Colour = tuple[int, int, int]
Pixels = npt.NDArray[np.uint8]
_OKABE_ITO: tuple[Colour, ...] = (
    (230, 159, 0), (0, 114, 178), (0, 158, 115), (213, 94, 0), (86, 180, 233), (240, 228, 66), (204, 121, 167),
)  # fmt: skip
_TOL_MUTED: tuple[Colour, ...] = (
    (204, 102, 119), (51, 34, 136), (221, 204, 119), (17, 119, 51), (136, 204, 238), (136, 34, 85), (68, 170, 153),
    (153, 153, 51), (170, 68, 153),
)  # fmt: skip
"""Both differ with any colour vision: Okabe and Ito (2008) without black; Tol's muted scheme (SRON/EPS/TN/09-002)."""
_SHADES = 1.0, 1.3, 0.6
_WHITE, _INK, _QUIET = (255, 255, 255), (0, 0, 0), (90, 90, 90)
_PALE = 0.3
"""Share of white in the grey slide below the colours."""
_LEAST, _MOST = 0.35, 0.85
"""Opacity of a class that is as likely as any other, and of a certain one."""
_GAP, _MARGIN, _LINE, _SWATCH = 24, 16, 26, 16
_FONT, _SMALL = 16, 14
_BAR_SHARE = 0.25
"""Longest scale bar as a share of the slide's width."""


@dataclass(frozen=True)
class Legend:
    """Words and colours of a picture.

    Attributes:
        title: above the slide.
        names: of the classes.
        colours: of the classes.
        shares: of the covered area, (K,).
        notes: lines below.
        graded: opacity follows the score of the class.
    """

    title: str
    names: Sequence[str]
    colours: Sequence[Colour]
    shares: Sequence[float]
    notes: Sequence[str]
    graded: bool


def palette(count: int) -> list[Colour]:
    """Colours of so many classes. Up to nine differ with any colour vision; more repeat in other shades."""
    if count <= len(_OKABE_ITO):
        return list(_OKABE_ITO[:count])
    return [
        _shaded(_TOL_MUTED[k % len(_TOL_MUTED)], _SHADES[k // len(_TOL_MUTED) % len(_SHADES)]) for k in range(count)
    ]


def _shaded(colour: Colour, factor: float) -> Colour:
    hue, lightness, saturation = colorsys.rgb_to_hls(*(part / 255 for part in colour))
    red, green, blue = colorsys.hls_to_rgb(hue, min(lightness * factor, 0.82), saturation)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_map(thumbnail_HWC: Pixels, found: ClassMap, scale: float, mpp: float, legend: Legend) -> Image.Image:
    """The slide, its map on the slide in grey, a legend and a scale bar.

    Args:
        thumbnail_HWC: the slide from its left upper corner.
        found: classes by place.
        scale: level-0 pixels to a pixel of the thumbnail.
        mpp: micrometres to a pixel of the thumbnail.
        legend: words and colours.
    """
    slide = Image.fromarray(thumbnail_HWC)
    painted = Image.fromarray(paint(thumbnail_HWC, found, scale, legend.colours, graded=legend.graded))
    width, height = slide.size
    beside = width <= 1.3 * height
    right, lower = (_MARGIN + width + _GAP, _MARGIN + _LINE) if beside else (_MARGIN, _MARGIN + _LINE + height + _GAP)
    font, small = _font(_FONT), _font(_SMALL)
    entries = [f"{name}  {_percent(share)}" for name, share in zip(legend.names, legend.shares, strict=True)]
    widths = [_SWATCH + 8 + round(font.getlength(text)) + _GAP for text in entries]
    total = max(right + width, _least_width(legend, widths, font, small)) + _MARGIN
    rows = _rows(widths, total - 2 * _MARGIN)
    top = lower + height + _MARGIN
    bar_height = _LINE + 10
    sheet = Image.new(
        "RGB", (total, top + bar_height + _LINE * len(rows) + _LINE * len(legend.notes) + _MARGIN), _WHITE
    )
    sheet.paste(slide, (_MARGIN, _MARGIN + _LINE))
    sheet.paste(painted, (right, lower))
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN - 4), legend.title, fill=_INK, font=font)
    _draw_bar(draw, (_MARGIN, top), width, mpp, small)
    top += bar_height
    for places in rows:
        left = _MARGIN
        for place in places:
            draw.rectangle((left, top + 2, left + _SWATCH, top + 2 + _SWATCH), fill=legend.colours[place], outline=_INK)
            draw.text((left + _SWATCH + 8, top), entries[place], fill=_INK, font=font)
            left += widths[place]
        top += _LINE
    for note in legend.notes:
        draw.text((_MARGIN, top), note, fill=_QUIET, font=small)
        top += _LINE
    return sheet


def paint(thumbnail_HWC: Pixels, found: ClassMap, scale: float, colours: Sequence[Colour], *, graded: bool) -> Pixels:
    """The slide in pale grey, with the colour of the class wherever there is one, (H, W, 3).

    Args:
        thumbnail_HWC: the slide.
        found: classes by place.
        scale: level-0 pixels to a pixel of the thumbnail.
        colours: of the classes.
        graded: a class is the paler the less certain it is.
    """
    height, width, _ = thumbnail_HWC.shape
    grey_HW = np.asarray(Image.fromarray(thumbnail_HWC).convert("L"), np.float32)
    picture = np.repeat((grey_HW * (1 - _PALE) + 255 * _PALE)[..., None], 3, axis=2)
    classes_YX, count = found.classes_YX, found.scores_YXK.shape[2]
    opacity_YX = np.full(classes_YX.shape, (_LEAST + _MOST) / 2)
    if graded:
        certainty_YX = (found.scores_YXK.max(axis=2) - 1 / count) / (1 - 1 / count)
        opacity_YX = _LEAST + (_MOST - _LEAST) * certainty_YX.clip(0, 1)
    colours_YX3 = np.asarray(colours, np.float32)[classes_YX.clip(0)]
    cells_HW2, covered_HW = found.sampled(width, height, scale)
    y, x = cells_HW2[covered_HW].T
    opacity = opacity_YX[y, x, None].astype(np.float32)
    picture[covered_HW] = picture[covered_HW] * (1 - opacity) + colours_YX3[y, x] * opacity
    return np.asarray(np.rint(picture), np.uint8)


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: Pillow's own font has no Greek letters."""
    import matplotlib as mpl

    return ImageFont.truetype(Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _percent(share: float) -> str:
    """A share as text; one that is not zero does not read 0 %."""
    return "< 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %" if 0 < share < 0.995 else f"{100 * share:.0f} %"


def _least_width(
    legend: Legend, widths: Sequence[int], font: ImageFont.FreeTypeFont,
    small: ImageFont.FreeTypeFont,
) -> int:  # fmt: skip
    """Pixels that no line of text must be cut at."""
    lines = [small.getlength(note) for note in legend.notes]
    return _MARGIN + math.ceil(max([font.getlength(legend.title), *lines, *widths]))


def _rows(widths: Sequence[int], most: int) -> list[list[int]]:
    """Places of ``widths`` in rows of at most ``most`` pixels."""
    rows: list[list[int]] = [[]]
    for place, width in enumerate(widths):
        if rows[-1] and sum(widths[other] for other in rows[-1]) + width > most:
            rows.append([])
        rows[-1].append(place)
    return rows


def scale_bar(width: float) -> float:
    """Micrometres of a bar of 1, 2 or 5 times a power of ten, at most a quarter of ``width`` micrometres."""
    most = width * _BAR_SHARE
    power = 10.0 ** math.floor(math.log10(most))
    return max(step * power for step in (1, 2, 5) if step * power <= most)


def _draw_bar(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], width: int, mpp: float,
    font: ImageFont.FreeTypeFont,
) -> None:  # fmt: skip
    length = scale_bar(width * mpp)
    left, top = corner
    right = left + round(length / mpp)
    middle = top + 8
    draw.line((left, middle, right, middle), fill=_INK, width=3)
    for end in (left, right):
        draw.line((end, middle - 6, end, middle + 6), fill=_INK, width=2)
    text = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"
    draw.text((right + 10, top - 2), text, fill=_INK, font=font)
