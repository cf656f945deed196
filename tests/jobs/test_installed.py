"""An installed package names a method, a body, a source and a sink by entry points; no change to ca2cl."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ca2cl.cli import main
from ca2cl.data.shards.index import ShardIndex
from ca2cl.errors import InputError
from ca2cl.methods.registry import find_method, known_method
from ca2cl.models.backbone import build_encoder, find_entry, is_arch
from ca2cl.registry.resolve import resolve_encoder
from tests.jobs.pretrain.test_methods import TOY
from tests.jobs.test_extensions import BODY, SINK, SOURCE
from tests.support.jobs import make_shards, training_lines

MODULES = {"toy_methods": TOY, "toy_bodies": BODY, "toy_sources": SOURCE, "toy_sinks": SINK}
POINTS = """
[ca2cl.methods]
toy = toy_methods:Toy
[ca2cl.backbones]
toybody = toy_bodies:tiny
[ca2cl.sources]
stripes = toy_sources:Stripes
[ca2cl.sinks]
lines = toy_sinks:Lines
"""


def install(folder: Path, name: str, points: str) -> None:
    """What ``pip install`` leaves of a package beside its modules."""
    info = folder / f"{name}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(points)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of the Python path with the package ``toys`` in it."""
    folder = tmp_path / "site"
    install(folder, "toys", POINTS)
    for name, text in MODULES.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in MODULES:
        sys.modules.pop(name, None)


def test_a_file_of_settings_names_what_is_installed(
    tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_shards(tmp_path, 4, size=32)
    settings = {
        "data": {"shards": "shards-0"},
        "method": {"name": "toy", "options": ["momentum=0.5"]},
        "model": {"arch": "toybody"},
        "run": {"steps": 1, "output_dir": "run"},
        "tracking": {"sinks": ["lines"]},
    }
    (tmp_path / "job.yaml").write_text(json.dumps(settings))
    assert main(["pretrain", "--recipe", "smoke", "--config", "job.yaml"]) == 0
    (line,) = training_lines(tmp_path / "run")
    assert line["loss"] == line["distance"]
    assert [row for row in (tmp_path / "run" / "sink.txt").read_text().splitlines() if row.startswith("1 ")]
    card = json.loads((tmp_path / "run" / "encoder" / "card.json").read_text())
    assert card["arch"] == "toybody"
    assert resolve_encoder("run").encoder.feature_dim == 12  # no CA2CL_BACKBONES: the package is installed
    requirements = [path.read_text() for path in (tmp_path / "ca2cl-runs").rglob("requirements.txt")]
    assert any("toys==1.2" in text.splitlines() for text in requirements), "a served encoder needs the package"


def test_a_source_of_tiles_by_name(tmp_path: Path, site: Path) -> None:
    out = tmp_path / "shards"
    assert main(["shard", "stripes:20", str(out), "--samples_per_shard", "8", "--workers", "2"]) == 0
    index = ShardIndex(out)
    assert (len(index), index.manifest.classes) == (20, ["even", "odd"])


def test_nothing_is_imported_to_find_a_name(site: Path) -> None:
    entry = find_entry("toybody")
    assert entry is not None and entry.packages == ("toys",) and is_arch("toybody")
    assert not MODULES.keys() & sys.modules.keys()
    assert known_method("toy").__name__ == "Toy"


def test_names_that_clash_are_one_line(
    tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A package takes no name of ca2cl's or of another package, and spoils no other name."""
    other = tmp_path / "other"
    install(
        other, "others",
        "[ca2cl.methods]\ntoy = json:loads\nsimclr = json:loads\n[ca2cl.backbones]\nresnet34 = json:loads\n"
        "odd = nowhere\n[ca2cl.sources]\nhf = json:loads\n",
    )  # fmt: skip
    monkeypatch.syspath_prepend(other)
    job = ["pretrain", "--recipe", "smoke", "--data.shards", "x", "--run.output_dir", "y"]
    for words, line in (
        (("--method.name", "toy"), "method.name is 'toy': others and toys both have that name in ca2cl.methods"),
        (("--method.name", "simclr"), "method.name is 'simclr': ca2cl and others both have that name"),
        (("--model.arch", "resnet34"), "model.arch is 'resnet34': ca2cl and others both have that name"),
        (("--model.arch", "odd"), "model.arch is 'odd': others registers 'nowhere' for it, not module:attribute"),
        (("--model.arch", "toybdy"), "did you mean toybody?"),
    ):
        assert main([*job, *words]) == 2
        error = capfd.readouterr().err.splitlines()
        assert len(error) == 1 and line in error[0], error
    assert main(["shard", "hf:NAME", str(tmp_path / "out")]) == 2
    assert "source is 'hf': ca2cl and others both have that name" in capfd.readouterr().err
    assert find_method("ca2cl").__name__ == "CA2CL" and build_encoder("toybody").feature_dim == 12


def test_what_is_not_installed_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there are ca2cl, simclr, distill; your own is package.module:Class"):
        find_method("toy-that-is-nowhere-near")
    assert not is_arch("toybody") and find_entry("toybody") is None
