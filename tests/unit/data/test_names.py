"""Folders as file servers, archives and other systems leave them: what is no tile is passed over by every verb, what
cannot be read or written down is refused before any work."""

from __future__ import annotations

import os
import shutil
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ca2cl.cli import main
from ca2cl.data.sources.base import SourceOptions
from ca2cl.data.sources.choose import open_source
from ca2cl.data.sources.names import as_text, is_clutter
from ca2cl.detection.engines.base import split_names
from ca2cl.detection.prepare.layouts import find_pictures, images_in
from ca2cl.errors import InputError
from ca2cl.evaluation.embed.tiles import SourceTiles, open_tiles
from ca2cl.reproduce.unpack import unpack
from tests.support.glands import write_pairs
from tests.unit.data.test_sources import everything, put

CLUTTER = (
    "@eaDir", "@EADIR", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot", "__MACOSX", ".ipynb_checkpoints",
    ".snapshot", ".zfs", ".Trash-1000", ".AppleDouble", "$RECYCLE.BIN", "System Volume Information", "~snapshot",
    "lost+found",
)  # fmt: skip
FILES = ("._a.png", ".a.png", ".DS_Store", "Thumbs.db", "desktop.ini", "Icon\r")


def litter(folder: Path) -> None:
    """Put into a folder all that no person puts there, as images."""
    put(folder, *(f"{name}/a.png/SYNOPHOTO_THUMB_M.png" for name in CLUTTER), *FILES)


def test_the_list_holds_names_and_not_their_likes() -> None:
    assert all(map(is_clutter, (*CLUTTER, *FILES)))
    assert not any(map(is_clutter, ("TUM", "a.png", "eaDir", "@tile.png", "#1.png", "~a.png", "recycle", "thumbs")))


def test_a_source_of_tiles_passes_clutter_over(tmp_path: Path) -> None:
    put(tmp_path, "A/t/a.png", "B/b.png")
    for folder in ("", "A", "A/t", "B"):
        litter(tmp_path / folder)
    source = open_source(str(tmp_path))
    assert [(tile.name, tile.label) for tile in everything(source)] == [("A/t/a.png", 0), ("B/b.png", 1)]


def test_a_lone_folder_beside_clutter_is_stepped_into(tmp_path: Path) -> None:
    put(tmp_path, "set/A/a.png", "set/B/b.png")
    litter(tmp_path)
    assert open_source(str(tmp_path)).classes == ["A", "B"]


def test_embedding_takes_no_apple_double_for_shards(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "._shard.tar")
    assert isinstance(open_tiles(str(tmp_path), None, SourceOptions()), SourceTiles)


def test_detection_passes_clutter_over(tmp_path: Path) -> None:
    write_pairs(tmp_path / "set", ["a"])
    for folder in ("", "images", "masks"):
        litter(tmp_path / "set" / folder)
    (picture,) = find_pictures("masks", tmp_path / "set", "images", "masks").pictures
    assert picture.name == "a"
    assert [path.name for path in images_in(tmp_path / "set" / "images")] == ["a.png"]
    for name in ("train.json", "._train.json", "valid.json", ".valid.json"):
        (tmp_path / name).write_text("{}")
    assert split_names(tmp_path) == ["train", "valid"]


def test_an_archive_is_unpacked_without_clutter(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in ("A/a.tif", "__MACOSX/A/._a.tif", "A/._a.tif", "A/@eaDir/a.tif/T.jpg", ".DS_Store", "A/Thumbs.db"):
            archive.writestr(f"set/{name}", name)
    unpack(tmp_path / "set.zip", tmp_path / "set")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*") if path.is_file()] == [
        "set.zip", "set/A/a.tif",
    ]  # fmt: skip


@pytest.mark.parametrize("link", ["set/B/b.png", "set/B", "set/A/deep/notes", "set/c.png"])
@pytest.mark.parametrize("target", ["away/x", "loop"])
def test_a_link_to_nowhere_is_refused(tmp_path: Path, link: str, target: str) -> None:
    """A tile, a class, a folder below one: a disk that is away must not cost what lies on it."""
    put(tmp_path, "set/A/deep/a.png")
    path = tmp_path / link
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(path if target == "loop" else tmp_path / target)
    with pytest.raises(InputError, match=rf"{path}: a link to .*mount the disk"):
        open_source(str(tmp_path / "set"))


def test_links_to_nowhere_are_counted_and_clutter_may_be_one(tmp_path: Path) -> None:
    put(tmp_path, "A/a.png")
    (tmp_path / ".lock").symlink_to("host:1234")
    assert len(open_source(str(tmp_path))) == 1
    for number in range(3):
        (tmp_path / f"A/{number}.png").symlink_to("nowhere")
    with pytest.raises(InputError, match="as 3 links"):
        open_source(str(tmp_path))


def test_an_empty_class_folder_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A cohort may lack a class; the mount point of a disk that is away looks the same."""
    put(tmp_path, "A/a.png", "notes/read.me")
    assert open_source(str(tmp_path)).classes == ["A"] and not caplog.messages
    (tmp_path / "B").mkdir()
    assert open_source(str(tmp_path)).classes == ["A"]
    assert "B: an empty class folder" in caplog.messages[0]
    assert open_source(str(tmp_path), SourceOptions(unlabelled=True)).classes == []


@pytest.mark.parametrize("link", ["images/b.png", "masks/b.png", "valid"])
def test_a_pair_or_a_split_that_is_a_link_to_nowhere_is_refused(tmp_path: Path, link: str) -> None:
    write_pairs(tmp_path / "train", ["a"])
    path = tmp_path / ("train" if "/" in link else "") / link
    path.symlink_to("nowhere")
    with pytest.raises(InputError, match=rf"{path}: a link to nowhere"):
        find_pictures("masks", tmp_path, "images", "masks")


def test_a_class_folder_that_is_no_text_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "in/A/a.png", os.fsdecode(b"in/Dr\xfcsen/b.png"))
    assert main(["shard", str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    told = capfd.readouterr().err
    assert r"b'Dr\xfcsen' is not UTF-8; rename it" in told and told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_source_folder_that_is_no_text_has_a_name_that_is(tmp_path: Path) -> None:
    put(tmp_path, os.fsdecode(b"in\xfc/A/a.png"))
    assert open_source(os.fsdecode(bytes(tmp_path) + b"/in\xfc")).name == "in\N{REPLACEMENT CHARACTER}"


def test_a_pair_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    write_pairs(tmp_path, ["a", os.fsdecode(b"b\xfc")])
    with pytest.raises(InputError, match=r"b'b\\xfc\.png' is not UTF-8"):
        find_pictures("masks", tmp_path, "images", "masks")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: shutil.rmtree(root / "valid/masks"), "valid: has images and no masks; restore that"),
        (lambda root: write_pairs(root / "VALID", ["a"]), "valid: VALID lies beside it"),
        (lambda root: write_pairs(root / os.fsdecode(b"\xfc"), ["a"]), r"the name of b'\\xfc' is not UTF-8"),
    ],
)
def test_no_split_is_lost(spoil: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    for split in ("train", "valid"):
        write_pairs(tmp_path / split, ["a"])
    assert len(find_pictures("masks", tmp_path, "images", "masks").pictures) == 2
    spoil(tmp_path)
    with pytest.raises(InputError, match=message):
        find_pictures("masks", tmp_path, "images", "masks")


def test_umlauts_are_one_name_however_a_system_writes_them(tmp_path: Path) -> None:
    whole = "Dr\N{LATIN SMALL LETTER U WITH DIAERESIS}sen"
    apart = unicodedata.normalize("NFD", whole)
    assert as_text(apart) == as_text(whole) == whole
    put(tmp_path, f"{apart}/a.png")
    assert open_source(str(tmp_path)).classes == [whole]
    put(tmp_path, f"{whole}/a.png")
    with pytest.raises(InputError, match="there twice"):
        open_source(str(tmp_path))
