"""Pictures of slides with their tissue and tiles.

Legend: H, W pixels of an overview, N tiles.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from ca2cl.common.files import replacing, writing
from ca2cl.slides.tissue.density import Mask, Pixels
from ca2cl.slides.tissue.mask import TissueMask

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
KEPT = "kept"
SHEET_SLIDES = 100
"""Slides on a sheet, which is drawn in memory."""
PAGE_PICTURES = 1000
"""Pictures on a page: some 35 MB, which browsers still scroll through."""
_COLUMNS, _LEAST_COLUMNS, _CELL = 10, 3, 320
_SIDES = ((100, 1000), (1000, 600))
_LEAST_SIDE = 320
_LINE, _SIZE, _MARGIN = 22, 14, 6
_THUMBNAIL, _THUMBNAIL_BYTES, _QUALITIES = 512, 30_000, (85, 70, 50, 30, 15)
_WHITE, _INK, _ERROR = (255, 255, 255), (0, 0, 0), (170, 0, 0)
_CUT = " ..."
_COLOURS = {  # Okabe and Ito (2008): told apart with any colour vision
    KEPT: (0, 158, 115),
    "background": (190, 190, 190),
    "pen": (213, 94, 0),
    "black": (60, 60, 60),
    "fold": (230, 159, 0),
    "blurred": (86, 180, 233),
    "outside": (240, 228, 66),
    "surplus": (0, 114, 178),
}
_OTHER = (204, 121, 167)
_TINT = 0.3
_LEAST_FRAME = 6
"""Pixels of the smallest tile that is framed; the frames of smaller ones would hide the slide."""
_STYLE = (
    "body{font:14px system-ui,sans-serif;margin:1.5em;background:#fff;color:#222}"
    "figure{display:inline-block;vertical-align:top;margin:0 1.5em 1.5em 0;max-width:100%}"
    "img{max-width:100%;display:block}figcaption{margin-top:.3em}.error{color:#a00}"
)


@dataclass(frozen=True)
class Preview:
    """A slide of a page or sheet."""

    title: str
    picture: Image.Image | None
    """None for a slide that could not be drawn."""
    note: str = ""
    """A line of text, such as the error."""


def drawn_slides(path: Path, slides: int) -> range:
    """Numbers of those of so many ``slides`` that are drawn: the first on a sheet, every n-th on a page."""
    if path.suffix.lower() != ".html":
        return range(min(slides, SHEET_SLIDES))
    return range(0, slides, max(-(-slides // PAGE_PICTURES), 1))


def thumbnail(overview_HWC: Pixels) -> bytes:
    """A small picture of a whole slide, as a JPEG."""
    picture = Image.fromarray(overview_HWC)
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)
    data = b""
    for quality in _QUALITIES:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality, optimize=True)
        data = buffer.getvalue()
        if len(data) <= _THUMBNAIL_BYTES:
            break
    return data


def picture_side(path: Path, slides: int) -> int:
    """Longer side in pixels to draw each of so many ``slides`` with."""
    if path.suffix.lower() != ".html":
        return _CELL - 2 * _MARGIN
    return next((side for most, side in _SIDES if slides <= most), _LEAST_SIDE)


def draw_preview(
    thumbnail_HWC: Pixels,
    mask: TissueMask,
    boxes_N4: npt.NDArray[np.float64],
    kept_N: npt.NDArray[np.bool_],
    reasons: Sequence[str],
    title: str,
    side: int = 1000,
) -> Image.Image:
    """Draw a slide with the outline of its tissue, its artefacts and its tiles.

    A kept tile is a frame; a dropped one is a frame with a stroke through it, but for background, which has none.

    Args:
        thumbnail_HWC: the whole slide.
        mask: of the whole slide, at any resolution.
        boxes_N4: ``x0, y0, x1, y1`` of the tiles in pixels of the thumbnail.
        kept_N: which of them are kept.
        reasons: why each of them was dropped; that of a kept one is ignored.
        title: the line above the picture.
        side: longer side of the picture in pixels; a smaller thumbnail is enlarged.
    """
    height, width = thumbnail_HWC.shape[:2]
    scale = side / max(height, width)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    picture = Image.fromarray(thumbnail_HWC).resize(
        size, Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST
    )
    _paint_mask(picture, mask)
    names = [KEPT if kept else reason for kept, reason in zip(kept_N.tolist(), reasons, strict=True)]
    _draw_tiles(picture, boxes_N4 * scale, names)
    return _framed(picture, title, Counter(names), side)


def _paint_mask(picture: Image.Image, mask: TissueMask) -> None:
    for name, where in mask.artefacts.items():
        tint = Image.new("RGB", picture.size, _COLOURS.get(name, _OTHER))
        picture.paste(Image.blend(picture, tint, 0.5), mask=_scaled(where, picture.size))
    tissue = np.asarray(_scaled(mask.tissue, picture.size)) > 0
    outline = tissue & ~ndimage.binary_erosion(tissue)
    picture.paste(_INK, mask=Image.fromarray(outline).convert("L"))


def _scaled(mask_HW: Mask, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(mask_HW).convert("L").resize(size, Image.Resampling.NEAREST)


def _draw_tiles(picture: Image.Image, boxes_N4: npt.NDArray[np.float64], names: Sequence[str]) -> None:
    order = sorted(range(len(names)), key=lambda tile: (names[tile] == KEPT, names[tile] != "background"))
    tint = picture.copy()
    draw, draw_tint = ImageDraw.Draw(picture), ImageDraw.Draw(tint)
    boxes = np.round(boxes_N4).astype(int).tolist()
    for tile in order:
        left, top, right, bottom = boxes[tile]
        corners, name = (left, top, max(right - 1, left), max(bottom - 1, top)), names[tile]
        colour = _COLOURS.get(name, _OTHER)
        framed = right - left >= _LEAST_FRAME
        if name != "background" and not (framed and name == KEPT):
            draw_tint.rectangle(corners, fill=colour)
        if framed:
            draw.rectangle(corners, outline=colour)
            if name not in (KEPT, "background"):
                draw.line(corners, fill=colour)
    picture.paste(Image.blend(picture, tint, _TINT))


def _framed(picture: Image.Image, title: str, counts: Counter[str], side: int) -> Image.Image:
    """The picture with a title above it and the colours of its tiles below it; a title beyond ``side`` is cut."""
    entries = [name for name in _COLOURS if counts[name]] + sorted(counts.keys() - _COLOURS.keys())
    font = ImageFont.load_default(_SIZE)
    texts = [f"{name} {counts[name]}" for name in entries]
    widths = [_LINE + round(font.getlength(text)) + 2 * _MARGIN for text in texts]
    rows = _wrapped(widths, max(picture.width, max(widths, default=0)))
    shown = _cut(title, side - 2 * _MARGIN, font)
    title_width = math.ceil(font.getlength(shown)) + 2 * _MARGIN
    width = max([picture.width, title_width, *(sum(widths[place] for place in row) for row in rows)])
    framed = Image.new("RGB", (width, picture.height + _LINE * (1 + len(rows))), _WHITE)
    framed.paste(picture, (0, _LINE))
    draw = ImageDraw.Draw(framed)
    draw.text((_MARGIN, 2), shown, fill=_INK, font=font)
    for row, places in enumerate(rows):
        left, top = 0, picture.height + _LINE * (1 + row)
        for place in places:
            colour = _COLOURS.get(entries[place], _OTHER)
            box = (left + _MARGIN, top + 5, left + _MARGIN + 12, top + 17)
            draw.rectangle(box, outline=colour, width=2)
            if entries[place] not in (KEPT, "background"):
                draw.line(box, fill=colour, width=2)
            draw.text((left + _LINE, top + 2), texts[place], fill=_INK, font=font)
            left += widths[place]
    return framed


def _cut(text: str, most: int, font: Font) -> str:
    """``text``, cut at the end if it is longer than ``most`` pixels."""
    if font.getlength(text) <= most:
        return text
    while text and font.getlength(text + _CUT) > most:
        text = text[:-1]
    return text + _CUT


def _wrapped(widths: Sequence[int], most: int) -> list[list[int]]:
    """Places of ``widths`` in rows of at most ``most`` pixels."""
    rows: list[list[int]] = []
    left = most + 1
    for place, width in enumerate(widths):
        if left + width > most:
            rows.append([])
            left = 0
        rows[-1].append(place)
        left += width
    return rows


def write_preview(path: Path, entries: Iterable[Preview], total: int) -> None:
    """Write a page (``.html``), or a sheet (``.png``) of the first ``SHEET_SLIDES``.

    A page is written slide by slide, and complete or not at all.

    Args:
        path: where to; the suffix decides.
        entries: drawn as they are taken; a sheet takes no more of them than it shows.
        total: how many there are.

    Raises:
        InputError: the file cannot be written.
    """
    with writing(path, "give another file with --preview, or leave it out"), replacing(path) as file:
        if path.suffix.lower() == ".html":
            for part in _page(entries, total):
                file.write(part.encode())
        else:
            _sheet(list(itertools.islice(entries, SHEET_SLIDES)), total).save(file, "PNG")


def _page(entries: Iterable[Preview], total: int) -> Iterator[str]:
    step = drawn_slides(Path("a.html"), total).step
    some = f", one of {step} drawn" if step > 1 else ""
    yield (
        "<!DOCTYPE html>\n<html lang=en><head><meta charset=utf-8><title>Slides</title>"
        f"<style>{_STYLE}</style></head><body><h1>{total} slide{'s' * (total != 1)}{some}</h1>\n"
    )
    for entry in entries:
        title, note = html.escape(entry.title), html.escape(entry.note)
        if entry.picture is None:
            yield f'<figure><b>{title}</b><figcaption class="error">{note}</figcaption></figure>\n'
            continue
        buffer = io.BytesIO()
        entry.picture.save(buffer, "JPEG", quality=85, subsampling=0)
        data = base64.b64encode(buffer.getvalue()).decode()
        width, height = entry.picture.size
        yield (
            f'<figure><img width={width} height={height} style="height:auto" alt="{title}" '
            f'src="data:image/jpeg;base64,{data}"><figcaption>{note}</figcaption></figure>\n'
        )
    yield "</body></html>\n"


def _sheet(entries: Sequence[Preview], total: int) -> Image.Image:
    """Up to ``SHEET_SLIDES`` slides in rows; below them a line for each that could not be drawn."""
    drawn = [entry.picture for entry in entries if entry.picture is not None]
    notes = [f"{entry.title}: {entry.note}" for entry in entries if entry.picture is None]
    columns = min(_COLUMNS, max(math.isqrt(len(drawn)), _LEAST_COLUMNS))
    rows, cell = -(-len(drawn) // columns), _CELL + 2 * _LINE
    bottom = rows * cell + _LINE
    sheet = Image.new("RGB", (columns * _CELL, bottom + _LINE * len(notes)), _WHITE)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_SIZE)
    shown = f"the first {len(entries)} of {total} slides" if total > len(entries) else f"{total} slides"
    draw.text((_MARGIN, 2), shown, fill=_INK, font=font)
    for place, picture in enumerate(drawn):
        small = picture.copy()
        small.thumbnail((_CELL - _MARGIN, cell - _MARGIN))
        sheet.paste(small, (place % columns * _CELL, _LINE + place // columns * cell))
    for place, note in enumerate(notes):
        line = _cut(note, sheet.width - 2 * _MARGIN, font)
        draw.text((_MARGIN, bottom + place * _LINE), line, fill=_ERROR, font=font)
    return sheet
