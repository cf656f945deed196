"""``ca2cl embed`` on made-up tissue: order, values, files, bad tiles, bad inputs."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from ca2cl.cli import main
from ca2cl.data.shards.index import ShardIndex
from ca2cl.errors import InputError
from ca2cl.evaluation.embed.run import run
from ca2cl.evaluation.embed.writer import read_about
from ca2cl.models.encoder_io import load_encoder
from ca2cl.models.preprocess import preprocess
from tests.support.embedding import (
    SIZE,
    SOURCE_RUN,
    TILES,
    config,
    damage,
    files,
    interrupt,
    make_tissue,
    vectors,
    write_encoder,
)


@pytest.fixture(scope="module")
def tissue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders, shards of them, and an encoder's folder."""
    return make_tissue(tmp_path_factory.mktemp("embed"))


@pytest.fixture(scope="module")
def embedded(tissue: Path) -> Path:
    """The Parquet file of the shards, made in one process and one go."""
    assert run(config(tissue, tissue / "whole.parquet")) == 0
    return tissue / "whole.parquet"


def pixels(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB")))


def own_features(tissue: Path, tile_HWC: torch.Tensor) -> npt.NDArray[np.float32]:
    """The encoder's features of one tile, by itself."""
    encoder, card = load_encoder(tissue / "encoder")
    with torch.inference_mode():
        features: npt.NDArray[np.float32] = encoder(preprocess(tile_HWC[None], SIZE, card.mean, card.std))[0].numpy()
    return features


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


def test_a_saved_dataset_is_a_source_too(tissue: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import datasets

    tiles = [path.read_bytes() for path in sorted((tissue / "tiles").glob("*/*"))[:3]]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    columns = {"image": [*({"bytes": tile, "path": None} for tile in tiles), None], "label": [1, 0, 1, 0]}
    datasets.Dataset.from_dict(columns, features).save_to_disk(str(tmp_path / "saved"))
    assert run(config(tissue, tmp_path / "v.parquet", source=str(tmp_path / "saved"))) == 0
    rows = pq.read_table(tmp_path / "v.parquet").drop_columns("vector").to_pylist()
    assert [(row["source"], row["label"]) for row in rows] == [("train[0]", "y"), ("train[1]", "x"), ("train[2]", "y")]
    np.testing.assert_allclose(
        vectors(tmp_path / "v.parquet")[1], own_features(tissue, pixels(tiles[1])), rtol=1e-4, atol=1e-5
    )
    assert "no image bytes in column" in caplog.text


def test_out_is_replaced_only_where_overwrite_says_so(tissue: Path, tmp_path: Path) -> None:
    out = tmp_path / "v.safetensors"
    (tmp_path / "v.keys.jsonl").write_text("mine")
    with pytest.raises(InputError, match=r"v\.keys\.jsonl: exists; .*--overwrite"):
        run(config(tissue, out))
    assert files(tmp_path) == ["v.keys.jsonl"]
    assert run(config(tissue, out, overwrite=True)) == 0
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(tmp_path.iterdir())]
    assert run(config(tissue, out)) == 0  # the same job: complete
    with pytest.raises(InputError, match=r"exists of another job .image_size \d+ -> 48.; .*--overwrite"):
        run(config(tissue, out, image_size=48))
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(tmp_path.iterdir())] == before
    assert run(config(tissue, out, overwrite=True)) == 0


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
        (("SHARDS", "v.parquet", "--max_bad_rate", "2"), "max_bad_rate is 2.0: use 0 or more, up to 1"),
        (("SHARDS", "v.parquet", "--image_size", "8"), "image_size is 8"),
        (("SHARDS", "v.parquet", "surplus"), "surplus"),
        (("SHARDS",), "OUT"),
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
