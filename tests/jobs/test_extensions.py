"""Extensions from outside the package: one file each, named by ``module:attribute``, and no change to ca2cl."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch

from ca2cl.cli import main
from ca2cl.config import TrackingConfig
from ca2cl.data.loading.sequential import iterate_tiles
from ca2cl.data.remote.reader import ShardReader
from ca2cl.data.shards.index import ShardIndex
from ca2cl.evaluation.embed.tiles import open_tiles
from ca2cl.models.backbone import TRUSTED
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.registry.resolve import resolve_encoder
from ca2cl.tracking.run import open_run
from tests.support.jobs import make_shards

SOURCE = '''
"""Tiles cut from one image of stripes: pixels, not files, each with its place."""
import numpy as np
from ca2cl.data.sources.base import Tile

class Reader:
    def __init__(self, side): self.side = side
    def where(self, tile): return f"stripes/{tile.name}"
    def read(self, tile):
        return np.full((self.side, self.side, 3), 10 * tile.row, np.uint8)

class Stripes:
    def __init__(self, where, options, *, mixed=False):
        self.name, self.classes, self.ungrouped = "stripes", ["even", "odd"], []
        self.count = int(where)
        self.labels = np.arange(self.count, dtype=np.int32) % 2
        self.digest, self.reader = f"stripes-{where}", Reader(24)
    def __len__(self): return self.count
    def tiles(self, rows):
        return [Tile(key=f"t{row}", name=f"t{row}", row=int(row), label=int(self.labels[row]), group="slide",
                     ext=None, meta={"x": 24 * int(row), "y": 0, "mpp": 0.5}) for row in rows]
'''


def place(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> str:
    """Write a module of the user's own; returns its name."""
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    return name


def test_a_source_of_pixels_is_sharded_and_embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = place(tmp_path, monkeypatch, "my_stripes", SOURCE)
    out = tmp_path / "shards"
    assert main(["shard", f"{module}:Stripes:20", str(out), "--samples_per_shard", "8", "--workers", "2"]) == 0
    index = ShardIndex(out)
    assert (len(index), index.manifest.classes, index.manifest.tile_size) == (20, ["even", "odd"], [24, 24])
    rows = torch.arange(20).numpy()
    (batch,) = iterate_tiles(index, ShardReader(str(out), None, index=index), rows, batch_size=20)
    keys = [key for part in index for key in part.key]
    assert batch[0][:, 0, 0, 0].tolist() == [10 * int(key[1:]) for key in keys] and len(set(keys)) == 20
    with tarfile.open(out / index.shards[0].name) as tar:
        first = next(one for one in tar if one.name.endswith(".json"))
        about = json.loads(tar.extractfile(first).read())  # type: ignore[union-attr]
    assert about["x"] == 24 * int(about["name"][1:]) and about["mpp"] == 0.5 and about["group"] == "slide"


def test_embed_reads_its_pixels_without_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ca2cl.data.sources.base import SourceOptions

    module = place(tmp_path, monkeypatch, "my_stripes_too", SOURCE)
    tiles = open_tiles(f"{module}:Stripes:5", None, SourceOptions())
    assert (len(tiles), tiles.tile_size) == (5, (24, 24))
    pixels = torch.zeros(24, 24, 3, dtype=torch.uint8).numpy()
    row, other = tiles.fill(3, pixels)
    assert other is None and row.label == "odd" and (pixels == 30).all()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module_here:Slides:x", "no module 'no_such_module_here'"),
        ("json:Slides:x", "json has no 'Slides'"),
        ("nowhere", "no such folder"),
    ],
)
def test_what_is_wrong_with_a_name_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, words: str
) -> None:
    assert main(["shard", name, str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err


SINK = '''
"""A metrics tracker that is a text file, and is away whenever a file says so."""
class Lines:
    def __init__(self, run_dir, name, params):
        self.folder, self.name = run_dir, name
        with (run_dir / "sink.txt").open("a") as file:
            file.write(f"begin {name} {params['tracking.experiment']}\\n")
    def write(self, records):
        if (self.folder / "away").exists():
            raise ConnectionError("nobody answers at https://me:secret@tracker/x")
        with (self.folder / "sink.txt").open("a") as file:
            for one in records:
                file.write(f"{one['step']} {one['loss']}\\n" if "step" in one else f"{one['event']}\\n")
'''


def test_a_sink_gets_every_line_and_may_be_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = place(tmp_path, monkeypatch, "my_sink", SINK)
    tracking = TrackingConfig(root=str(tmp_path / "store"), sinks=(f"{module}:Lines",))
    run_dir = tmp_path / "run"
    run = open_run(run_dir, PretrainConfig(tracking=tracking))
    for step in (1, 2, 3):
        run.log_step({"step": step, "loss": step / 4})
    assert run.finish("FINISHED")
    lines = (run_dir / "sink.txt").read_text().splitlines()
    assert lines[0] == "begin run ca2cl"
    assert [line for line in lines if line[0].isdigit()] == ["1 0.25", "2 0.5", "3 0.75"]

    (run_dir / "away").touch()
    run = open_run(run_dir, PretrainConfig(tracking=tracking), resume=True, step=3)
    run.log_step({"step": 4, "loss": 1.0})
    assert run.finish("KILLED", timeout=10), "MLflow has all of it"
    assert "is away (nobody answers" in caplog.text and "my_sink:Lines does not have all" in caplog.text
    assert "secret" not in caplog.text

    (run_dir / "away").unlink()
    run = open_run(run_dir, PretrainConfig(tracking=tracking), resume=True, step=4)
    assert run.finish("FINISHED")
    lines = (run_dir / "sink.txt").read_text().splitlines()
    assert [line for line in lines if line[0].isdigit()] == ["1 0.25", "2 0.5", "3 0.75", "4 1.0"]


BODY = '''
"""A body of one convolution: pooled colours of patches."""
from torch import nn
from ca2cl.models.backbone import Backbone
from ca2cl.models.perturbed_conv import Stem

class Tiny(Backbone):
    feature_dim, patch_size = 12, 8
    def __init__(self):
        super().__init__()
        self.stem = Stem.of(nn.Conv2d(3, 24, 8, stride=8))
        self.out = nn.Linear(24, 12)
    def forward(self, x_BCHW, stem_delta=None):
        return self.out(self.stem(x_BCHW, stem_delta).relu().mean((2, 3)))

def tiny(arch, options):
    return Tiny()
'''


def test_a_body_is_pretrained_resolved_and_probed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    arch = f"{place(tmp_path, monkeypatch, 'my_bodies', BODY)}:tiny"
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        make_shards(tmp_path, 4, seed=seed, size=32)
    job = ["pretrain", "--recipe", "smoke", "--data.shards", "shards-0", "--run.steps", "2", "--model.arch", arch]
    assert main([*job, "--run.output_dir", "run", "--run.micro_batch_size", "16"]) == 0
    assert "model.norm sync changes nothing: my_bodies:tiny has no BatchNorm" in caplog.text
    capsys.readouterr()
    probe = ["probe", "--train", "shards-0", "--test", "shards-1", "--imagenet", "false", "--encoder", "run"]
    probe += ["--labels", "1.0", "--seeds", "1", "--classifiers", "knn", "--workers", "0"]
    assert main(probe) == 2
    assert f"set {TRUSTED}={arch}" in capsys.readouterr().err
    assert resolve_encoder("run", arch=arch).encoder.feature_dim == 12
    monkeypatch.setenv(TRUSTED, arch)
    assert main(probe) == 0
    assert "encoder" in capsys.readouterr().out
