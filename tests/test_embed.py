"""``ca2cl embed`` end to end on made-up tissue: order, values, processes, kills, bad tiles, bad inputs."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from ca2cl.cli import main
from ca2cl.config import IMAGENET_MEAN, IMAGENET_STD, TrackingConfig
from ca2cl.data.index import ShardIndex
from ca2cl.data.shard import ShardConfig
from ca2cl.data.shard import run as shard
from ca2cl.data.synthetic import write_tissue
from ca2cl.data.workers import TileWorkers
from ca2cl.errors import InputError
from ca2cl.evaluation import embed as embed_module
from ca2cl.evaluation.embed import EmbedConfig, run
from ca2cl.evaluation.embed_files import read_about
from ca2cl.evaluation.embed_parts import Parts, mine
from ca2cl.model.encoder import build_encoder
from ca2cl.tracking.encoder_files import EncoderCard, load_encoder, save_encoder
from ca2cl.views.preprocess import preprocess
from tests.jobs import LAUNCH, ROOT, free_port, start

SOURCE_RUN = "0123456789abcdef0123456789abcdef"
SIZE, TILES, PART = 32, 36, 10


@pytest.fixture(scope="module")
def tissue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders, shards of them, and an encoder's folder."""
    root = tmp_path_factory.mktemp("embed")
    write_tissue(root / "tiles", TILES // 9, size=48, seed=0)
    assert shard(ShardConfig(source=str(root / "tiles"), out=str(root / "shards"), samples_per_shard=8, workers=1)) == 0
    torch.manual_seed(5)
    write_encoder(root / "encoder")
    return root


def write_encoder(folder: Path, factor: float = 1.0) -> None:
    state = {name: tensor * factor for name, tensor in build_encoder("resnet18").state_dict().items()}
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    card = EncoderCard(arch="resnet18", feature_dim=512, input_size=SIZE, mean=mean, std=std, source_run_id=SOURCE_RUN)
    save_encoder(folder, state, card)


def config(tissue: Path, out: Path, **changes: Any) -> EmbedConfig:
    settings: dict[str, Any] = {
        "encoder": str(tissue / "encoder"),
        "source": str(tissue / "shards"),
        "out": str(out),
        "batch_size": 4,
        "part_size": PART,
        "workers": 0,
        "device": "cpu",
        "tracking": TrackingConfig(root=str(tissue / "runs")),
    }
    return EmbedConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def embedded(tissue: Path) -> Path:
    """The Parquet file of the shards, made in one process and one go."""
    assert run(config(tissue, tissue / "whole.parquet")) == 0
    return tissue / "whole.parquet"


def vectors(path: Path) -> npt.NDArray[np.float32]:
    column = pq.read_table(path).column("vector").combine_chunks()
    return np.asarray(column.flatten()).reshape(len(column), -1)


def pixels(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB")))


def own_features(tissue: Path, tile_HWC: torch.Tensor) -> npt.NDArray[np.float32]:
    """The encoder's features of one tile, by itself."""
    encoder, card = load_encoder(tissue / "encoder")
    with torch.inference_mode():
        features: npt.NDArray[np.float32] = encoder(preprocess(tile_HWC[None], SIZE, card.mean, card.std))[0].numpy()
    return features


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_rows_are_the_index_order_with_the_encoders_own_features(embedded: Path, tissue: Path) -> None:
    index, table = ShardIndex(tissue / "shards"), pq.read_table(embedded)
    expected = [
        (key, index.classes[label], info.name, (tissue / "shards" / info.name).read_bytes()[offset : offset + size])
        for info, samples in zip(index.shards, index, strict=True)
        for key, label, offset, size in zip(
            samples.key, samples.label.tolist(), samples.offset.tolist(), samples.size.tolist(), strict=True
        )
    ]
    rows = table.drop_columns("vector").to_pylist()
    assert [(row["key"], row["label"], row["source"]) for row in rows] == [entry[:3] for entry in expected]
    assert table.column_names == ["key", "label", "source", "vector"]
    found = vectors(embedded)
    assert found.shape == (TILES, 512) and found.dtype == np.float32
    for row in (0, 7, 8, 19, TILES - 1):
        np.testing.assert_allclose(found[row], own_features(tissue, pixels(expected[row][3])), rtol=1e-4, atol=1e-5)
    assert len(np.unique(found.round(4), axis=0)) == TILES  # any mix-up would be seen


def test_the_file_says_what_it_is_of(embedded: Path, tissue: Path) -> None:
    about = read_about(embedded)
    assert about is not None
    assert about["encoder"]["source_run_id"] == SOURCE_RUN
    assert about["encoder"]["uri"] == str(tissue / "encoder")
    assert about["encoder"]["card"]["feature_dim"] == 512
    assert about["identity"]["image_size"] == SIZE
    assert about["data"]["manifest_digest"] == ShardIndex(tissue / "shards").manifest.digest
    assert about["data"]["undecodable"] == 0
    footer = pq.read_metadata(embedded)
    assert [footer.row_group(group).num_rows for group in range(footer.num_row_groups)] == [10, 10, 10, 6]
    assert pq.read_schema(embedded).field("vector").type.list_size == 512
    assert not embedded.with_name("whole.parquet.parts").exists()


def test_pandas_and_datasets_read_it(embedded: Path, tmp_path: Path) -> None:
    frame = pd.read_parquet(embedded)
    np.testing.assert_array_equal(np.stack(frame["vector"].to_list()), vectors(embedded))
    import datasets

    read = datasets.Dataset.from_parquet(str(embedded), cache_dir=str(tmp_path / "cache"))
    assert read.features["vector"].length == 512
    assert read["key"][:] == frame["key"].to_list()


def test_workers_change_nothing_and_batches_only_rounding(embedded: Path, tissue: Path, tmp_path: Path) -> None:
    assert run(config(tissue, tmp_path / "a.parquet", workers=2)) == 0
    assert (tmp_path / "a.parquet").read_bytes() == embedded.read_bytes()
    assert run(config(tissue, tmp_path / "b.parquet", batch_size=36, part_size=50)) == 0
    np.testing.assert_allclose(vectors(tmp_path / "b.parquet"), vectors(embedded), rtol=1e-4, atol=1e-5)


def test_safetensors_holds_the_same_vectors_and_its_side_file_the_keys(
    embedded: Path, tissue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "v.safetensors"
    assert run(config(tissue, out)) == 0
    assert capsys.readouterr().out.startswith(f"{out}: {TILES} vectors of 512 numbers, ")
    with safe_open(out, "np") as file:
        assert list(file.keys()) == ["vectors"]
        np.testing.assert_array_equal(file.get_tensor("vectors"), vectors(embedded))
        assert json.loads(file.metadata()["ca2cl"]) == read_about(out)
    lines = [json.loads(line) for line in (tmp_path / "deep" / "v.keys.jsonl").read_text().splitlines()]
    assert lines == pq.read_table(embedded).drop_columns("vector").to_pylist()
    assert files(tmp_path / "deep") == ["v.keys.jsonl", "v.safetensors"]


def test_a_folder_gives_its_shards_vectors_in_the_order_of_its_paths(
    embedded: Path, tissue: Path, tmp_path: Path
) -> None:
    assert run(config(tissue, tmp_path / "f.parquet", source=str(tissue / "tiles"), workers=1)) == 0
    table, sharded = pq.read_table(tmp_path / "f.parquet"), pq.read_table(embedded)
    paths = sorted(str(path.relative_to(tissue / "tiles")) for path in (tissue / "tiles").glob("*/*"))
    assert table.column("source").to_pylist() == paths
    assert table.column("label").to_pylist() == [path.split("/")[0] for path in paths]
    by_key = dict(zip(sharded.column("key").to_pylist(), vectors(embedded), strict=True))
    for key, vector in zip(table.column("key").to_pylist(), vectors(tmp_path / "f.parquet"), strict=True):
        np.testing.assert_allclose(vector, by_key[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("workers", [0, 1])
def test_loose_images_and_other_sizes_are_taken_too(tissue: Path, tmp_path: Path, workers: int) -> None:
    sides = {"loose.png": (40, 40), "a/wide.png": (40, 90), "a/b/deep.png": (40, 40), "c/small.jpg": (20, 20)}
    generator = np.random.default_rng(0)
    for name, side in sides.items():
        (tmp_path / "t" / name).parent.mkdir(parents=True, exist_ok=True)
        noise = generator.integers(0, 256, (*side, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "t" / name)
    assert run(config(tissue, tmp_path / "t.parquet", source=str(tmp_path / "t"), workers=workers)) == 0
    rows = pq.read_table(tmp_path / "t.parquet").drop_columns("vector").to_pylist()
    assert [(row["source"], row["label"]) for row in rows] == [
        ("a/b/deep.png", "a"),
        ("a/wide.png", "a"),
        ("c/small.jpg", "c"),
        ("loose.png", None),
    ]
    for row, vector in zip(rows, vectors(tmp_path / "t.parquet"), strict=True):
        own = own_features(tissue, pixels((tmp_path / "t" / row["source"]).read_bytes()))
        np.testing.assert_allclose(vector, own, rtol=1e-4, atol=1e-5)


class Stop(Exception):
    """A kill, as far as files can tell."""


def interrupt(monkeypatch: pytest.MonkeyPatch, settings: EmbedConfig, after: int) -> Path:
    """Run until ``after`` parts are written; the parts' folder."""
    write, done = Parts.write, list[int]()

    def write_some(self: Parts, part: Any, *rest: Any) -> None:
        if len(done) == after:
            raise Stop
        done.append(part.number)
        write(self, part, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Parts, "write", write_some)
        with pytest.raises(Stop):
            run(settings)
    assert not Path(settings.out).exists()
    return Path(f"{settings.out}.parts")


def test_two_processes_go_on_from_one_and_write_the_same_file(
    embedded: Path, tissue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "two.parquet"
    parts = interrupt(monkeypatch, config(tissue, out), after=1)
    assert files(parts) == ["job.json", "lock", "part-000000.parquet"]
    finished = launch_two(tissue, out, tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert f"1 of {-(-TILES // PART)} parts are finished" in finished.stderr
    assert f"{TILES} vectors of 512 numbers" in finished.stdout
    assert out.read_bytes() == embedded.read_bytes()
    assert files(tmp_path) == ["two.parquet"]


def launch_two(tissue: Path, out: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    launch = [*LAUNCH, "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", str(free_port()), "-m", "ca2cl", "embed"]
    settings = ["--batch_size", "4", "--part_size", str(PART), "--workers", "0"]
    return start([*launch, *settings, "--encoder", str(tissue / "encoder"), str(tissue / "shards"), str(out)], folder)


def test_what_rank_0_refuses_ends_both_with_one_line(tissue: Path, tmp_path: Path) -> None:
    (tmp_path / "there.parquet").write_bytes(b"mine")
    refused = launch_two(tissue, tmp_path / "there.parquet", tmp_path)
    assert refused.returncode != 0
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("ca2cl: error")]
    assert "there.parquet: exists" in line
    assert files(tmp_path) == ["there.parquet"] and (tmp_path / "there.parquet").read_bytes() == b"mine"


def test_a_killed_job_goes_on_from_its_finished_parts(
    tissue: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, parts = tmp_path / "k.parquet", tmp_path / "k.parquet.parts"
    many = {"part_size": 2, "batch_size": 1, "image_size": 128}
    command = [sys.executable, "-m", "ca2cl", "embed", "--encoder", str(tissue / "encoder"), str(tissue / "shards")]
    command += [str(out), "--workers", "1", *(part for name in many for part in (f"--{name}", str(many[name])))]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.DEVNULL) as process:
        patience = time.monotonic() + 240
        while len(list(parts.glob("part-*.parquet"))) < 2 and process.poll() is None and time.monotonic() < patience:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not out.exists()
    left = len(list(parts.glob("part-*.parquet")))
    assert 2 <= left < TILES // 2
    with caplog.at_level(logging.INFO):
        assert run(config(tissue, out, **many)) == 0
    assert f"{left} of {TILES // 2} parts are finished" in caplog.text
    assert run(config(tissue, tmp_path / "whole.parquet", **many)) == 0
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert not parts.exists()


def test_finished_parts_are_taken_and_not_made_again(
    embedded: Path, tissue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tissue, tmp_path / "v.parquet")
    parts = interrupt(monkeypatch, settings, after=3)
    (parts / "part-000001.parquet").write_bytes(b"torn")
    asked = []
    answers = TileWorkers.answers

    def record(self: Any, requests: Any) -> Any:
        asked.extend(requests)
        return answers(self, requests)

    monkeypatch.setattr(TileWorkers, "answers", record)
    assert run(settings) == 0
    assert asked == [(10, 14), (14, 18), (18, 20), (30, 34), (34, 36)]
    assert (tmp_path / "v.parquet").read_bytes() == embedded.read_bytes()


def test_killed_while_it_put_its_parts_away_it_is_complete(
    tissue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tissue, tmp_path / "v.parquet")
    with monkeypatch.context() as patched:
        patched.setattr(Parts, "remove", lambda self: self.path(0).unlink())
        run(settings)
    before = (tmp_path / "v.parquet").stat().st_mtime_ns
    assert run(settings) == 0
    assert "already complete" in capsys.readouterr().out
    assert (tmp_path / "v.parquet").stat().st_mtime_ns == before
    assert files(tmp_path) == ["v.parquet"]


def test_killed_in_the_merge_it_leaves_no_half_file(
    embedded: Path, tissue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tissue, tmp_path / "v.parquet")
    with monkeypatch.context() as patched:

        def stop(*_: Any) -> None:
            raise Stop

        patched.setattr(embed_module, "write_vectors", stop)
        with pytest.raises(Stop):
            run(settings)
    (tmp_path / ".v.parquet.tmp-1").write_bytes(b"half")
    assert run(settings) == 0
    assert (tmp_path / "v.parquet").read_bytes() == embedded.read_bytes()
    assert files(tmp_path) == ["v.parquet"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoder": "random"}, "another encoder"),
        ({"image_size": 48}, "another image_size"),
        ({"source": "tiles"}, "data"),
    ],
)
def test_parts_of_another_job_are_never_mixed_in(
    tissue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    parts = interrupt(monkeypatch, config(tissue, tmp_path / "v.parquet"), after=2)
    if "source" in changes:
        changes = {"source": str(tissue / changes["source"])}
    other = config(tissue, tmp_path / "v.parquet", **{"image_size": SIZE, **changes})
    before = files(parts)
    with pytest.raises(InputError, match=f"holds parts of a job with .*{words}.*--overwrite true"):
        run(other)
    assert files(parts) == before
    assert run(config(tissue, tmp_path / "v.parquet", **{"image_size": SIZE, **changes}, overwrite=True)) == 0
    assert run(config(tissue, tmp_path / "w.parquet", **{"image_size": SIZE, **changes})) == 0
    assert (tmp_path / "v.parquet").read_bytes() == (tmp_path / "w.parquet").read_bytes()


def test_out_is_replaced_only_where_overwrite_says_so(tissue: Path, tmp_path: Path) -> None:
    out = tmp_path / "v.safetensors"
    (tmp_path / "v.keys.jsonl").write_text("mine")
    with pytest.raises(InputError, match=r"v\.keys\.jsonl: exists; .*--overwrite true"):
        run(config(tissue, out))
    assert files(tmp_path) == ["v.keys.jsonl"]
    assert run(config(tissue, out, overwrite=True)) == 0
    with pytest.raises(InputError, match="exists"):
        run(config(tissue, out))
    assert run(config(tissue, out, overwrite=True)) == 0


def damage(tissue: Path, target: Path, samples: tuple[int, ...]) -> tuple[str, list[str]]:
    """A copy of the shards in which these samples do not decode; its path and the samples' keys."""
    shutil.copytree(tissue / "shards", target)
    index, keys = ShardIndex(target), []
    for sample in samples:
        shard, row = index.locate(sample)
        held, tar = index.samples(shard), target / index.shards[shard].name
        content = bytearray(tar.read_bytes())
        content[int(held.offset[row]) : int(held.offset[row]) + 16] = bytes(16)
        tar.write_bytes(content)
        keys.append(held.key[row])
    return str(target), keys


def test_a_tile_that_does_not_decode_is_left_out_and_named(
    embedded: Path, tissue: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    source, (key,) = damage(tissue, tmp_path / "shards", (11,))
    with caplog.at_level(logging.WARNING):
        assert run(config(tissue, tmp_path / "v.parquet", source=source)) == 0
    assert f"tile {key} left out: " in caplog.text
    assert "35 vectors of 512 numbers, 1 tiles that do not decode left out" in capsys.readouterr().out
    about = read_about(tmp_path / "v.parquet")
    assert about is not None and about["data"]["undecodable"] == 1
    assert list(about["data"]["undecodable_first"]) == [key]
    assert pq.read_table(tmp_path / "v.parquet").column("key").to_pylist() == [
        other for other in pq.read_table(embedded).column("key").to_pylist() if other != key
    ]
    np.testing.assert_allclose(
        vectors(tmp_path / "v.parquet"), np.delete(vectors(embedded), 11, axis=0), rtol=1e-4, atol=1e-5
    )


def test_too_many_bad_tiles_stop_it_also_over_several_runs(
    tissue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, keys = damage(tissue, tmp_path / "shards", (1, 35))
    settings = config(tissue, tmp_path / "v.parquet", source=source)
    interrupt(monkeypatch, settings, after=2)  # one of them is in a finished part
    with pytest.raises(InputError, match=rf"max_bad_rate is 0.01: at least 2 of {TILES} .*{keys[0]}.*--max_bad_rate"):
        run(settings)
    assert not (tmp_path / "v.parquet").exists()
    assert run(config(tissue, tmp_path / "v.parquet", source=source, max_bad_rate=0.1)) == 0
    assert len(vectors(tmp_path / "v.parquet")) == TILES - 2


def test_a_part_in_which_nothing_decodes_is_a_part(tissue: Path, tmp_path: Path) -> None:
    source, _ = damage(tissue, tmp_path / "shards", (2, 3))
    settings = {"source": source, "max_bad_rate": 1.0, "part_size": 2, "batch_size": 1}
    assert run(config(tissue, tmp_path / "v.parquet", **settings)) == 0
    assert len(vectors(tmp_path / "v.parquet")) == TILES - 2
    source, _ = damage(tissue, tmp_path / "all", tuple(range(TILES)))
    with pytest.raises(InputError, match=f"none of {TILES} tiles could be decoded"):
        run(config(tissue, tmp_path / "w.parquet", **{**settings, "source": source}))


def test_an_encoder_that_diverged_is_refused_and_leaves_nothing(tissue: Path, tmp_path: Path) -> None:
    write_encoder(tmp_path / "encoder", float("nan"))
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="not finite for 4 of 4 tiles; use an encoder that converged"):
        run(config(tissue, tmp_path / "out" / "v.parquet", encoder=str(tmp_path / "encoder")))
    assert files(tmp_path / "out") == []


def test_half_precision_is_close_and_another_job(embedded: Path, tissue: Path, tmp_path: Path) -> None:
    assert run(config(tissue, tmp_path / "v.parquet", precision="bf16")) == 0
    found, exact = vectors(tmp_path / "v.parquet"), vectors(embedded)
    assert found.dtype == np.float32 and not np.array_equal(found, exact)
    assert np.linalg.norm(found - exact) < 0.03 * np.linalg.norm(exact)


def test_a_second_job_into_the_same_file_is_kept_out(tissue: Path, tmp_path: Path) -> None:
    parts = tmp_path / "v.parquet.parts"
    parts.mkdir()
    holder = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(parts / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(InputError, match="another `ca2cl embed` is writing here"):
            run(config(tissue, tmp_path / "v.parquet"))
        other.communicate(b"\n")


def test_shares_are_contiguous_and_complete() -> None:
    for todo, world in ((list(range(10)), 4), ([3, 5], 4), ([], 2)):
        shares = [mine(todo, rank, world) for rank in range(world)]
        assert sum(shares, []) == todo
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere", "v.parquet"), "nowhere: no such folder; give shards, a folder of images"),
        (("empty", "v.parquet"), "empty: no images here"),
        (("SHARDS", "v.csv"), "out is 'v.csv': give a file that ends in .parquet or .safetensors"),
        (("SHARDS", "/dev/null/v.parquet"), "out is '/dev/null/v.parquet': cannot be written"),
        (("SHARDS", "taken.parquet"), "taken.parquet: exists"),
        (("SHARDS", "v.parquet", "--encoder", "nowhere"), "encoder 'nowhere': not there"),
        (("SHARDS", "v.parquet", "--device", "cuda:77"), "device is 'cuda:77'"),
        (("SHARDS", "v.parquet", "--batch_size", "0"), "batch_size is 0: use 1 or more"),
        (("SHARDS", "v.parquet", "--part_size", "100000"), "part_size is 100000: use 1 or more, up to 65536"),
        (("SHARDS", "v.parquet", "--max_bad_rate", "2"), "max_bad_rate is 2.0: use a share from 0 to 1"),
        (("SHARDS", "v.parquet", "--image_size", "8"), "image_size is 8"),
        (("SHARDS", "v.parquet", "surplus"), "surplus"),
        (("SHARDS",), "out"),
        (("http://nowhere.invalid/shards", "v.parquet"), "cache_dir is none"),
        (("tars", "v.parquet"), "no manifest here"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: tuple[str, ...],
    words: str,
    tissue: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "shard-000000.tar").touch()
    (tmp_path / "taken.parquet").touch()
    before = files(tmp_path)
    monkeypatch.chdir(tmp_path)
    named = [str(tissue / "shards") if word == "SHARDS" else word for word in arguments]
    encoder = () if "--encoder" in named else ("--encoder", str(tissue / "encoder"))
    assert main(["embed", *encoder, *named]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("ca2cl: error: ") and words in line, line
    assert files(tmp_path) == before
