"""Annotations against slow oracles: single pixels, the shoelace formula, and files as QuPath and ASAP write them."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ca2cl.errors import InputError
from ca2cl.slides.regions.polygons import Regions, object_array
from ca2cl.slides.regions.read import check_inside, find_mask, read_regions
from ca2cl.slides.regions.shares import OUTSIDE, WITHOUT_CLASS, classify_tiles, covered_shares
from ca2cl.slides.regions.write import write_geojson

SQUARE = [[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]]
HOLE = [[2, 2], [4, 2], [4, 4], [2, 4], [2, 2]]
SIDE = 12


def ring(x0: float, y0: float, x1: float, y1: float) -> list[list[float]]:
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]


def feature(coordinates: Any, classification: Any = None, kind: str = "Polygon", **properties: Any) -> dict[str, Any]:
    more = {} if classification is None else {"classification": classification}
    geometry = {"type": kind, "coordinates": coordinates}
    return {"type": "Feature", "geometry": geometry, "properties": {**more, **properties}}


def written(folder: Path, value: Any, name: str = "a.geojson") -> Path:
    path = folder / name
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def asap(folder: Path, *annotations: str, head: str = "") -> Path:
    text = "".join(annotations)
    return written(folder, f"<?xml version='1.0'?>{head}<ASAP_Annotations><Annotations>{text}</Annotations>"
                   "<AnnotationGroups><Group Name='Tumor' PartOfGroup='None'/></AnnotationGroups></ASAP_Annotations>",
                   "a.xml")  # fmt: skip


def drawn(group: str, points: list[list[float]], kind: str = "Polygon") -> str:
    rows = "".join(f'<Coordinate Order="{n}" X="{x}" Y="{y}"/>' for n, (x, y) in enumerate(points))
    return f'<Annotation Name="A" Type="{kind}" PartOfGroup="{group}"><Coordinates>{rows}</Coordinates></Annotation>'


def area(regions: Regions, name: str | None) -> float:
    return float(shapely.area(shapely.union_all(regions.of_class(name))))


# --- shares and classes ---


def shoelace(points: list[tuple[int, int]]) -> float:
    return abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairwise([*points, points[0]]))) / 2


def pixels_of(rectangles: list[tuple[int, int, int, int]], box: tuple[int, int, int, int]) -> float:
    """Share of a box's pixels that lie in any of the rectangles, by loops."""
    x0, y0, x1, y1 = box
    inside = 0
    for x in range(x0, x1):
        for y in range(y0, y1):
            inside += any(a <= x < c and b <= y < d for a, b, c, d in rectangles)
    return inside / ((x1 - x0) * (y1 - y0))


@st.composite
def rectangle(draw: st.DrawFn) -> tuple[int, int, int, int]:
    x, y = draw(st.integers(0, SIDE - 1)), draw(st.integers(0, SIDE - 1))
    return x, y, draw(st.integers(x + 1, SIDE)), draw(st.integers(y + 1, SIDE))


NAMES = st.sampled_from(["a", "b", "c", None])


@settings(max_examples=150, deadline=None)
@given(
    drawn=st.lists(st.tuples(rectangle(), NAMES), max_size=6),
    boxes=st.lists(rectangle(), min_size=1, max_size=6),
    least=st.sampled_from([0.01, 0.25, 1 / 3, 0.5, 1.0]),
)
@example(drawn=[((0, 0, 1, 10), "a")], boxes=[(0, 9, 1, 12)], least=1 / 3)  # equal but for rounding
def test_classes_of_tiles_are_those_of_counted_pixels(
    drawn: list[tuple[tuple[int, int, int, int], str | None]], boxes: list[tuple[int, int, int, int]], least: float
) -> None:
    """Classes overlap, boxes overlap, and shares are often equal to each other or to the least one."""
    expected = []
    for box in boxes:
        shares = {name: pixels_of([r for r, n in drawn if n == name], box) for name in ("b", "a", None)}
        best = max(("b", "a"), key=lambda name: shares[name])  # the first of equals
        index = ("b", "a").index(best) if shares[best] >= least else None
        expected.append(index if index is not None else WITHOUT_CLASS if shares[None] >= least else OUTSIDE)
    shapes = object_array([shapely.box(*r) for r, _ in drawn])
    regions = Regions(Path("a"), shapes, tuple(name for _, name in drawn))
    assert classify_tiles(regions, np.array(boxes, float), least, ["b", "a"]).tolist() == expected


@settings(max_examples=60, deadline=None)
@given(corners=st.lists(st.tuples(st.integers(0, SIDE), st.integers(0, SIDE)), min_size=3, max_size=8, unique=True))
def test_shares_of_a_grid_add_up_to_the_shoelace_area(corners: list[tuple[int, int]]) -> None:
    """Star-shaped polygons with slanted edges, less a part of the grid's tiles wholly inside or outside."""
    middle = (sum(x for x, _ in corners) / len(corners), sum(y for _, y in corners) / len(corners))
    corners = sorted(corners, key=lambda p: math.atan2(p[1] - middle[1], p[0] - middle[0]))
    polygon = shapely.polygons(corners)
    if not shapely.is_valid(polygon):
        return
    tiles = shapely.box(*np.array([(x, y, x + 2, y + 3) for x in range(0, SIDE, 2) for y in range(0, SIDE, 3)]).T)
    shares = covered_shares(object_array([polygon, polygon]), tiles, shapely.STRtree(tiles))
    assert 6 * shares.sum() == pytest.approx(shoelace(corners), abs=1e-6)


def test_the_share_of_a_slanted_outline_is_that_of_fine_points() -> None:
    """Each tile by itself: 40 x 40 points of it, in or out by the crossings of a ray."""
    corners = [(1, 0), (11, 4), (7, 6), (12, 12), (2, 9), (5, 5)]

    def inside(x: float, y: float) -> bool:
        return sum(
            (y0 > y) != (y1 > y) and x < x0 + (y - y0) * (x1 - x0) / (y1 - y0)
            for (x0, y0), (x1, y1) in pairwise([*corners, corners[0]])
        ) % 2 == 1  # fmt: skip

    places = [(x, y) for x in range(0, SIDE, 4) for y in range(0, SIDE, 4)]
    tiles = shapely.box(*np.array([(x, y, x + 4, y + 4) for x, y in places]).T)
    shares = covered_shares(object_array([shapely.polygons(corners)]), tiles, shapely.STRtree(tiles))
    steps = (np.arange(40) + 0.5) / 10
    expected = [np.mean([inside(x + dx, y + dy) for dx in steps for dy in steps]) for x, y in places]
    np.testing.assert_allclose(shares, expected, atol=0.01)


def test_outlines_of_many_corners_are_cut_without_loss() -> None:
    angle = np.linspace(0, 2 * np.pi, 4_000, endpoint=False)
    radius = 400 + 60 * np.sin(9 * angle) + 5 * np.sin(100 * angle)
    points = np.c_[500 + radius * np.cos(angle), 500 + radius * np.sin(angle)]
    grid = np.arange(0, 1000, 100.0)
    x, y = (side.ravel() for side in np.meshgrid(grid, grid))
    tiles = shapely.box(x, y, x + 100, y + 100)
    shares = covered_shares(object_array([shapely.polygons(points)]), tiles, shapely.STRtree(tiles))
    whole = shapely.polygons(points)
    np.testing.assert_allclose(
        shares, [shapely.area(shapely.intersection(whole, t)) / 10_000 for t in tiles], atol=1e-8
    )
    assert 0 < ((shares > 0) & (shares < 1)).sum() < len(tiles)


def test_no_regions_and_no_tiles() -> None:
    empty = Regions(Path("a"), object_array([]), ())
    assert classify_tiles(empty, np.array([[0.0, 0, 1, 1]]), 0.5, ["a"]).tolist() == [OUTSIDE]
    assert classify_tiles(empty, np.empty((0, 4)), 0.5, ["a"]).tolist() == []


# --- QuPath's GeoJSON ---


def test_every_form_of_qupath_is_read(tmp_path: Path) -> None:
    collection = {"type": "GeometryCollection", "geometries": [
        {"type": "Polygon", "coordinates": [ring(0, 20, 1, 21)]}, {"type": "Point", "coordinates": [0, 0]},
    ]}  # fmt: skip
    features = [
        feature([SQUARE, HOLE], {"name": "Tumor", "color": [200, 0, 0]}, objectType="annotation", name="not a class"),
        feature([[ring(20, 0, 22, 2)], [ring(30, 0, 31, 1)]], "Stroma", "MultiPolygon"),
        feature([ring(40, 0, 43, 1)], {"names": ["Tumor", "Positive"], "color": [1, 2, 3]}),
        feature([ring(50, 0, 52, 1)], {"name": "Positive", "colorRGB": -1, "parentClass": {"name": "Tumor"}}),
        feature([ring(60, 0, 66, 1)]),
        {"type": "Feature", "geometry": collection, "properties": {"classification": {"name": "Necrosis"}}},
        feature([0, 0], "Tumor", "Point"),
        feature([[0, 0], [1, 1]], "Tumor", "LineString"),
        feature([ring(0, 0, 99, 99)], "Tumor", objectType="cell"),
        feature([ring(0, 0, 99, 99)], "Tumor", objectType="detection"),
        {**feature([ring(0, 0, 99, 99)], "Tumor"), "id": "PathTileObject"},
        {"type": "Feature", "geometry": None, "properties": None},
        feature([ring(70, 0, 74, 1)], objectType="annotation", childObjects=[feature([ring(70, 0, 71, 1)], "Stroma")]),
    ]
    for name, value in {"a": {"type": "FeatureCollection", "features": features}, "b": features}.items():
        regions = read_regions(written(tmp_path, value, f"{name}.json"))
        assert regions.classes == ("Necrosis", "Stroma", "Tumor", "Tumor: Positive")
        areas = {name: area(regions, name) for name in (*regions.classes, None)}
        assert areas == {"Tumor": 96, "Stroma": 6, "Tumor: Positive": 5, "Necrosis": 1, None: 10}
        assert (regions.repaired, regions.ignored) == (0, 7)
    assert area(read_regions(written(tmp_path, features[0])), "Tumor") == 96
    assert read_regions(written(tmp_path, {"type": "FeatureCollection", "features": []})).classes == ()


def test_outlines_that_cross_themselves_or_are_open_are_repaired(tmp_path: Path) -> None:
    bow_tie = [[0, 0], [2, 2], [2, 0], [0, 2], [0, 0]]
    # goes around the square from (1, 1) to (3, 3) twice, and leaves out a corner of 3/4
    loop_twice = [[0, 0], [4, 0], [4, 4], [0, 4], [0, 1], [3, 1], [3, 3], [1, 3], [1, 0.5], [0, 0]]
    regions = read_regions(written(tmp_path, [
        feature([bow_tie], "tie"), feature([loop_twice], "twice"), feature([SQUARE[:4]], "open"),
        feature([[[0, 0], [5, 5], [0, 0]]], "line"), feature([], "nothing"), feature([[]], "nothing"),
    ]))  # fmt: skip
    assert {name: area(regions, name) for name in regions.classes} == {"tie": 2, "twice": 15.25, "open": 100}
    assert (regions.repaired, regions.ignored) == (3, 3)


BAD = {
    '{"type": "FeatureColl': "not JSON",
    "": "not JSON",
    "[" * 100_000: "not JSON",
    '"text"': "features is 'text'",
    '{"type": "Topology"}': "type is 'Topology'",
    '{"type": "FeatureCollection"}': "features is None",
    "[3]": "features[0] is 3",
    '[{"geometry": null, "properties": [1]}]': "features[0].properties is [1]",
    '[{"geometry": {"type": "Circle"}}]': "features[0].geometry.type is 'Circle'",
    '[{"geometry": 7}]': "features[0].geometry.type is 7",
    '[{"geometry": {"type": ["Point"]}}]': "features[0].geometry.type is ['Point']",
    '[{"geometry": {"type": "Polygon", "coordinates": {}}}]': "features[0].geometry.coordinates is {}",
    '[{"geometry": {"type": "Polygon", "coordinates": [[[0, 0], [1, NaN], [2, 0]]]}}]': "a coordinate is nan",
    '[{"geometry": {"type": "Polygon", "coordinates": [[[0, 0], [1e400, 0], [2, 1]]]}}]': "a coordinate is inf",
    '[{"geometry": {"type": "Polygon", "coordinates": [[[0, 0], [1e12, 0], [2, 1]]]}}]': "a coordinate is 1",
    '[{"geometry": {"type": "Polygon", "coordinates": [[["0", "0"], ["1", "0"], ["2", "1"]]]}}]': "a ring is [['0'",
    '[{"geometry": {"type": "Polygon", "coordinates": [[[0, 0], [1], [2, 1]]]}}]': "a ring is [[0, 0], [1]",
    '[{"geometry": {"type": "Polygon", "coordinates": [[0, 1, 2, 3]]}}]': "a ring is [0, 1, 2, 3]",
    '[{"geometry": null, "properties": {"classification": {"name": 3}}}]': "classification is {'name': 3}",
    '[{"geometry": null, "properties": {"classification": "a\\nb"}}]': "classification is 'a\\nb'",
    '[{"geometry": null, "properties": {"childObjects": 3}}]': "childObjects is 3",
}


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_a_bad_geojson_is_one_line_with_its_place(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InputError) as caught:
        read_regions(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and BAD[text] in message and "export the annotations again" in message


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """No other error than an InputError, wherever a file is cut or a byte is changed."""
    folder = tmp_path_factory.getbasetemp()
    path = data.draw(st.sampled_from([
        written(folder, [feature([SQUARE, HOLE], {"name": "Tumor", "color": [1, 2, 3]}, objectType="annotation")]),
        asap(folder, drawn("Tumor", SQUARE), drawn("None", HOLE, "Spline")),
    ]))  # fmt: skip
    whole = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at : at + data.draw(st.sampled_from([1, len(whole)]))] = data.draw(st.binary(max_size=2))
    path.write_bytes(whole)
    try:
        regions = read_regions(path)
    except InputError as error:
        assert str(path) in str(error)
    else:
        assert len(regions.shapes_M) == len(regions.names) and (shapely.area(regions.shapes_M) > 0).all()


# --- ASAP's XML ---


def test_asap_groups_are_classes(tmp_path: Path) -> None:
    shuffled = '<Coordinate Order="2" X="24" Y="4"/><Coordinate Order="0" X="20" Y="0"/>'
    shuffled += '<Coordinate Order="3" X="20" Y="4"/><Coordinate Order="1" X="24" Y="0"/>'
    regions = read_regions(asap(
        tmp_path, drawn("_0", SQUARE[:4]), drawn("_1", ring(0, 20, 2, 22), "Rectangle"), drawn("None", HOLE, "Spline"),
        f'<Annotation Name="B" PartOfGroup="_0"><Coordinates>{shuffled}</Coordinates></Annotation>',
        drawn("_0", [[0, 0]], "Dot"), drawn("_0", [[0, 0], [1, 1]], "Polygon"),
    ))  # fmt: skip
    assert {name: area(regions, name) for name in (*regions.classes, None)} == {"_0": 116, "_1": 4, None: 4}
    assert (regions.repaired, regions.ignored) == (0, 2)


def test_excluded_classes_are_cut_out_of_all_others(tmp_path: Path) -> None:
    path = asap(tmp_path, drawn("_0", SQUARE), drawn("None", SQUARE), drawn("_2", ring(0, 0, 10, 4)),
                drawn("_2", ring(0, 2, 10, 5)), drawn("_1", ring(1, 1, 3, 3)))  # fmt: skip
    regions = read_regions(path, exclude=["_2", "not in this file"])
    assert {name: area(regions, name) for name in (*regions.classes, None)} == {"_0": 50, None: 50}
    assert read_regions(path).classes == ("_0", "_1", "_2")


BOMB = '<!DOCTYPE a [<!ENTITY x "ha"><!ENTITY y "&x;&x;">]>'


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("<ASAP_Annotations><Annot", "not XML"),
        ("", "not XML"),
        ("<?xml version='1.0' encoding='no-such'?><a/>", "not XML"),
        ("<Annotations/>", "its root is <Annotations>"),
        (f"{BOMB}<ASAP_Annotations>&y;</ASAP_Annotations>", "has a DOCTYPE (a)"),
        (f"<ASAP_Annotations>{drawn('T', SQUARE)}{drawn('T', [[math.nan, 1]])}</ASAP_Annotations>",
         "Annotation 2: a coordinate is nan"),
        ("<ASAP_Annotations><Annotation><Coordinate X='1,5' Y='2'/></Annotation></ASAP_Annotations>",
         "Annotation 1: X is '1,5', not a number"),
        ("<ASAP_Annotations><Annotation><Coordinate X='1'/></Annotation></ASAP_Annotations>", "Y is None"),
    ],
)  # fmt: skip
def test_a_bad_xml_is_one_line_with_its_place(tmp_path: Path, text: str, fault: str) -> None:
    path = written(tmp_path, text, "a.xml")
    with pytest.raises(InputError) as caught:
        read_regions(path)
    assert str(caught.value).startswith(f"{path}: ") and fault in str(caught.value)


# --- finding files ---


def test_the_file_of_a_slide_is_found(tmp_path: Path) -> None:
    for name in ("a.geojson", "b.svs.geojson", "b.json", "c.xml", "d.json", "d.xml", "e.geojson", "other.txt"):
        (tmp_path / name).touch()
    found = {name: find_mask(tmp_path, name) for name in ("a.svs", "b.svs", "sub/c.ndpi", "e.ome.tif", "none.svs")}
    names = {name: path and path.name for name, path in found.items()}
    assert names == {"a.svs": "a.geojson", "b.svs": "b.svs.geojson", "sub/c.ndpi": "c.xml", "e.ome.tif": "e.geojson",
                     "none.svs": None}  # fmt: skip
    assert find_mask(tmp_path / "a.geojson", "z.svs") == tmp_path / "a.geojson"
    with pytest.raises(InputError, match="d.json and d.xml are both for the slide d.svs; remove one"):
        find_mask(tmp_path, "d.svs")
    with pytest.raises(InputError, match="not there"):
        find_mask(tmp_path / "nowhere", "a.svs")
    for call in (lambda path: find_mask(path, "a.svs"), read_regions):
        with pytest.raises(InputError, match=r"not a file of .geojson, .json, .xml"):
            call(tmp_path / "other.txt")
    with pytest.raises(InputError, match="cannot be read"):
        read_regions(tmp_path / "gone.json")


def test_annotations_of_another_image_are_refused(tmp_path: Path) -> None:
    regions = read_regions(written(tmp_path, [feature([SQUARE]), feature([ring(90, 90, 120, 120)])]))
    check_inside(regions, 100, 100)  # over the edge is drawn by hand
    with pytest.raises(InputError, match=r"from \(90, 90\) to \(120, 120\) is not within the slide's 80 x 80 pixels"):
        check_inside(regions, 80, 80)


# --- writing for QuPath ---

COLOURS = {"Tumor": (200, 0, 0), "Stroma": (0, 150, 0)}
BOXES = np.array([[0, 0, 10.5, 10], [10.5, 0, 21, 10], [50, 50, 60, 60], [70, 0, 80, 10]])
INDEX = np.array([0, 0, 1, -1])


def test_tiles_are_written_as_detections_that_qupath_reads(tmp_path: Path) -> None:
    path = tmp_path / "tiles.geojson"
    write_geojson(path, BOXES, INDEX, COLOURS, {"score": np.array([0.25, 0.75, np.nan, 0])})
    collection = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert collection["type"] == "FeatureCollection" and len(collection["features"]) == 4
    assert collection["features"][0] == {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring(0, 0, 10.5, 10)]},
        "properties": {
            "objectType": "detection",
            "classification": {"name": "Tumor", "color": [200, 0, 0]},
            "measurements": {"score": 0.25},
        },
    }
    assert [sorted(one["properties"]) for one in collection["features"][2:]] == [
        ["classification", "objectType"], ["measurements", "objectType"],
    ]  # fmt: skip
    assert read_regions(path).ignored == 4


def test_merged_tiles_are_annotations_that_come_back(tmp_path: Path) -> None:
    path = tmp_path / "tiles.geojson"
    write_geojson(path, BOXES, INDEX, COLOURS, {"score": np.array([0.25, 0.75, np.nan, 0])}, merge=True)
    features = json.loads(path.read_text())["features"]
    assert [one["properties"].get("measurements") for one in features] == [
        {"tiles": 1, "score": 0}, {"tiles": 2, "score": 0.5}, {"tiles": 1},
    ]  # fmt: skip
    assert len(features[1]["geometry"]["coordinates"][0]) == 5  # one rectangle of two tiles
    regions = read_regions(path)
    assert classify_tiles(regions, BOXES, 1.0, ["Tumor", "Stroma"]).tolist() == INDEX.tolist()
    assert regions.repaired == regions.ignored == 0


def test_no_tiles_are_an_empty_collection(tmp_path: Path) -> None:
    for merge in (False, True):
        write_geojson(tmp_path / "a.geojson", np.empty((0, 4)), np.empty(0, int), COLOURS, merge=merge)
        assert json.loads((tmp_path / "a.geojson").read_text()) == {"type": "FeatureCollection", "features": []}


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        write_geojson(tmp_path / "no" / "a.geojson", BOXES, INDEX, COLOURS)
