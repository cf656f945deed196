"""Settings of tiles that are cut from slides."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from annotated_types import Ge, Gt, Interval

from ca2cl.common.optional import need
from ca2cl.common.ranges import check_ranges, require
from ca2cl.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SlideOptions:
    """Tiles of slides; ``mpp`` says that the source is one of slides."""

    mpp: float | None = None
    """Micrometres to a pixel of the tiles. Needed for slides, and makes the source one of slides: a slide, a folder or
    quoted pattern ("slides/*.svs"), or a CSV with the column slide and, if you like, patient, label, mpp and split."""
    tile: int = 224
    """Side in pixels of the tiles cut from slides."""
    overlap: int = 0
    """Pixels that neighbouring tiles share."""
    edge: Literal["drop", "pad"] = "drop"
    """Tiles that reach beyond the right and lower edge of a slide. pad: white beyond it."""
    tissue: float = 0.5
    """Least share of a tile that is tissue. 0 keeps all tiles."""
    mask: str | None = None
    """Annotations: a folder of NAME.geojson (QuPath) or NAME.xml (ASAP), or one such file. Tiles outside of them are
    dropped, and their classes become the tiles' classes."""
    mask_share: float = 0.5
    """Least share of a tile that its class covers."""
    mask_exclude: tuple[str, ...] = ()
    """Classes of the annotations whose area is cut out of all others, such as _2 of CAMELYON16."""
    max_tiles: int | None = None
    """Most tiles of a slide, drawn by the seed; none keeps all."""
    assume_mpp: tuple[str, ...] = ()
    """PATTERN=VALUE: micrometres a pixel of slides that state none, by their name, such as "*.svs=0.25". There is no
    default: a guess would be silent, and wrong for half of the slides."""
    sharpness: float | None = None
    """Least sharpness of a tile; none uses the default, or 0 if tissue is 0, which keeps all tiles."""
    strict: bool = False
    """End with exit code 2 if any slide failed. Otherwise it is a line of slides.jsonl, and the others go on."""
    preview: str | None = None
    """File to draw slides in, with tissue and tiles: NAME.html for all slides, NAME.png for the first ones."""

    @property
    def least_sharpness(self) -> float | None:
        """The setting, with its default for ``tissue`` 0."""
        return 0.0 if self.sharpness is None and self.tissue == 0 else self.sharpness

    def check_slides(self) -> None:
        """Refuse values that no slide could be cut by.

        Raises:
            InputError: one of them.
        """
        check_ranges(
            self, mpp=Interval(gt=0, le=100), tile=Ge(16), overlap=Ge(0), tissue=Interval(ge=0, le=1),
            mask_share=Interval(gt=0, le=1), max_tiles=Ge(1), sharpness=Ge(0),
        )  # fmt: skip
        require(self.overlap < self.tile, "overlap", self.overlap, f"use less than --tile {self.tile}")
        for rule in self.assume_mpp:
            pattern, equals, value = rule.rpartition("=")
            try:
                check_ranges(_Rule(float(value)), value=Gt(0))
            except (ValueError, InputError):
                equals = ""
            require(bool(pattern and equals), "assume_mpp", rule, 'use PATTERN=VALUE, such as "*.svs=0.25"')
        if self.mpp is None and (given := [name for name, value in slide_settings(self).items() if value]):
            raise InputError(f"{given[0]} is set without mpp: it is for slides; give --mpp, such as 0.5 for 20x")
        if self.preview is not None:
            known = self.preview.endswith((".html", ".png"))
            require(known, "preview", self.preview, "give a file NAME.html or NAME.png")


@dataclass(frozen=True)
class _Rule:
    value: float


def check_installed() -> None:
    """Refuse slides where what reads them is not installed.

    Raises:
        MissingPackage: it is not.
    """
    for name in ("openslide", "skimage", "shapely"):
        need(name, 'install it with pip install "ca2cl[slides]"')


def slide_options(options: SlideOptions) -> dict[str, Any]:
    """All settings by name, of a configuration that has more."""
    return {field.name: getattr(options, field.name) for field in fields(SlideOptions)}


def slide_settings(options: SlideOptions, *, defaults: bool = False) -> dict[str, Any]:
    """The settings that decide about tiles; those that are the defaults only with ``defaults``."""
    return {
        field.name: list(value) if isinstance(value, tuple) else value
        for field in fields(SlideOptions)
        if field.name not in ("strict", "preview")
        and ((value := getattr(options, field.name)) != field.default or defaults)
    }
