"""Slides as other vendors write them, made by tifffile: Philips, Leica, and a generic pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.slides import Pixels, halved

_SPACING = '<DataObject ObjectType="PixelDataRepresentation"><Attribute Name="DICOM_PIXEL_SPACING" Group="0x0028" \
Element="0x0030" PMSVR="IDoubleArray">&quot;{y}&quot; &quot;{x}&quot;</Attribute><Attribute \
Name="PIIM_PIXEL_DATA_REPRESENTATION_NUMBER" Group="0x1001" Element="0x8B02" PMSVR="IUInt16">{number}</Attribute>\
<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_COLUMNS" Group="0x2001" Element="0x115E" PMSVR="IUInt32">{width}\
</Attribute><Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_ROWS" Group="0x2001" Element="0x115D" PMSVR="IUInt32">\
{height}</Attribute></DataObject>'
_PHILIPS = '<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport"><Attribute \
Name="DICOM_MANUFACTURER" Group="0x0008" Element="0x0070" PMSVR="IString">PHILIPS</Attribute><Attribute \
Name="PIM_DP_SCANNED_IMAGES" Group="0x301D" Element="0x1003" PMSVR="IDataObjectArray"><Array><DataObject \
ObjectType="DPScannedImage"><Attribute Name="PIM_DP_IMAGE_TYPE" Group="0x301D" Element="0x1004" PMSVR="IString">WSI\
</Attribute><Attribute Name="DICOM_PIXEL_SPACING" Group="0x0028" Element="0x0030" PMSVR="IDoubleArray">&quot;{y}&quot; \
&quot;{x}&quot;</Attribute><Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE" Group="0x1001" Element="0x8B01" \
PMSVR="IDataObjectArray"><Array>{levels}</Array></Attribute></DataObject></Array></Attribute></DataObject>'
_LEICA = '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01"><collection name="c" \
uuid="urn:uuid:0" sizeX="{canvas[0]}" sizeY="{canvas[1]}"><barcode></barcode><image name="m" uuid="urn:uuid:1">\
<creationDate>2020-01-01T00:00:00Z</creationDate><device model="Leica SCN400" version="1"/><pixels sizeX="{macro[0]}" \
sizeY="{macro[1]}"><dimension sizeX="{macro[0]}" sizeY="{macro[1]}" r="0" ifd="0"/></pixels><view sizeX="{canvas[0]}" \
sizeY="{canvas[1]}" offsetX="0" offsetY="0" spacingZ="0"/><scanSettings><objectiveSettings><objective>1</objective>\
</objectiveSettings><illuminationSettings><numericalAperture>0.1</numericalAperture><illuminationSource>brightfield\
</illuminationSource></illuminationSettings></scanSettings></image><image name="i" uuid="urn:uuid:2"><creationDate>\
2020-01-01T00:00:00Z</creationDate><device model="Leica SCN400" version="1"/><pixels sizeX="{size[0]}" \
sizeY="{size[1]}">{levels}</pixels><view sizeX="{view[0]}" sizeY="{view[1]}" offsetX="{offset[0]}" \
offsetY="{offset[1]}" spacingZ="0"/><scanSettings><objectiveSettings><objective>20</objective></objectiveSettings>\
<illuminationSettings><numericalAperture>0.4</numericalAperture><illuminationSource>brightfield</illuminationSource>\
</illuminationSettings></scanSettings></image></collection></scn>'


def _pages(path: Path, pictures: Sequence[Pixels], description: str, *, tile: int = 256, **options: Any) -> Path:
    """A TIFF with these pictures as tiled pages; the description is of the first."""
    import tifffile

    options = {"photometric": "rgb", "compression": "deflate"} | options
    with tifffile.TiffWriter(path, bigtiff=options.pop("bigtiff", False)) as tiff:
        for number, picture in enumerate(pictures):
            reduced = options.get("subfiletype", int(number > 0))
            tiff.write(
                picture, tile=(tile, tile), metadata=None, description=description if number == 0 else None,
                **options | {"subfiletype": reduced},
            )  # fmt: skip
    return path


def write_philips(path: Path, pixels: Pixels, mpp: tuple[float, float], levels: Sequence[int] = (1, 2)) -> Path:
    """Philips' TIFF: levels are padded to whole tiles, and their resolution is in an XML text."""
    pictures, entries = [], []
    for number, times in enumerate((0, *levels)):
        small = halved(pixels, times)
        padding = [(0, -side % 256) for side in small.shape[:2]]
        pictures.append(np.pad(small, [*padding, (0, 0)], constant_values=255))
        height, width = pictures[-1].shape[:2]
        x, y = (one * 1e-3 * 2**times for one in mpp)
        entries.append(_SPACING.format(x=x, y=y, number=number, width=width, height=height))
    about = _PHILIPS.format(x=mpp[0] * 1e-3, y=mpp[1] * 1e-3, levels="".join(entries))
    return _pages(path, pictures, about, software="Philips DP v1.0")


def write_leica(path: Path, pixels: Pixels, mpp: float, canvas: tuple[int, int], offset: tuple[int, int]) -> Path:
    """Leica's SCN: ``pixels`` at ``offset`` of an empty canvas of this size, in its pixels."""
    height, width = pixels.shape[:2]
    nanometres = lambda side: round(side * mpp * 1000)  # noqa: E731
    macro = np.full((256, 256, 3), 255, np.uint8)
    pictures = [macro, pixels, halved(pixels, 2)]
    levels = "".join(
        f'<dimension sizeX="{one.shape[1]}" sizeY="{one.shape[0]}" r="{number}" ifd="{number + 1}"/>'
        for number, one in enumerate(pictures[1:])
    )
    about = _LEICA.format(
        canvas=tuple(map(nanometres, canvas)), macro=(256, 256), size=(width, height), levels=levels,
        view=(nanometres(width), nanometres(height)), offset=tuple(map(nanometres, offset)),
    )  # fmt: skip
    resolution = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    return _pages(path, pictures, about, bigtiff=True, subfiletype=0, **resolution)


def write_generic(path: Path, pixels: Pixels, mpp: tuple[float, float] | None, **options: Any) -> Path:
    """A tiled TIFF with a pyramid, as libvips writes it; with resolution tags if ``mpp`` is given."""
    if mpp is not None:
        options |= {"resolution": tuple(1e4 / one for one in mpp), "resolutionunit": "CENTIMETER"}
    return _pages(path, [pixels, halved(pixels), halved(pixels, 2)], "", **options)
