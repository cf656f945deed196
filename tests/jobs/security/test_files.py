"""Nothing that a file holds is ever run: a pickle, or its like, in every place that a file is read from."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ca2cl.cli import main
from ca2cl.common.job_dir import JobDir
from ca2cl.common.records import read_fields
from ca2cl.config import IMAGENET_MEAN, IMAGENET_STD
from ca2cl.data.decode import BadSample, decode
from ca2cl.data.shards.index import INDEX_NAME, MANIFEST_NAME, ShardIndex
from ca2cl.data.sources.choose import open_source
from ca2cl.detection.coco.files import read_coco
from ca2cl.detection.coco.instances import read_mask
from ca2cl.detection.engines.checkpoint import CARD, WEIGHTS, DetectorCard, write_detector
from ca2cl.detection.engines.registry import load_detector
from ca2cl.errors import InputError
from ca2cl.evaluation.embed.parts import Parts
from ca2cl.evaluation.embed.writer import read_about
from ca2cl.evaluation.finetune.report import _predictions as read_predictions
from ca2cl.export.to_timm import TIMM
from ca2cl.export.to_torchvision import TORCHVISION
from ca2cl.models.backbone import build_encoder
from ca2cl.models.encoder_io import EncoderCard, save_encoder
from ca2cl.registry.resolve import resolve_encoder
from ca2cl.report.material import RunMaterial
from ca2cl.report.run_summary import nested
from ca2cl.reproduce.data_summary import read_facts
from ca2cl.tracking.journal import read_journal
from ca2cl.tracking.run import read_run
from ca2cl.training.checkpoint import Checkpointer, read_state, restore
from tests.support.pickles import Bait, spring
from tests.support.shards import encode, random_tiles, write_shards
from tests.unit.training.test_training import make_engine

FORMS = ("pickle", "torch_zip", "torch_old", "numpy", "joblib", "yaml")
ENCODER = EncoderCard(arch="resnet18", feature_dim=512, input_size=32, mean=IMAGENET_MEAN, std=IMAGENET_STD)
DETECTOR = DetectorCard(
    head="retinanet_fpn", arch="resnet18", classes=("gland",), mean=IMAGENET_MEAN, std=IMAGENET_STD, test_side=64,
    longest_side=64, norm="frozen", engine="torchvision", engine_version="1",
)  # fmt: skip


@pytest.fixture
def bait(tmp_path: Path) -> Iterator[Bait]:
    """Untouched at the end of every test that takes it."""
    bait = Bait(tmp_path)
    yield bait
    assert not bait.sprung


@pytest.mark.parametrize("form", FORMS)
def test_the_bait_works(tmp_path: Path, form: str) -> None:
    bait = Bait(tmp_path)
    spring(form, bait.forms[form])
    assert bait.sprung and tuple(bait.forms) == FORMS


def _index(folder: Path) -> None:
    write_shards(folder, [encode(tile) for tile in random_tiles(3)])


def _encoder(folder: Path) -> None:
    save_encoder(folder, build_encoder("resnet18").state_dict(), ENCODER)


def _detector(folder: Path) -> None:
    write_detector(folder, DETECTOR, {"x": torch.zeros(1)})


def _checkpoint(folder: Path) -> None:
    Checkpointer(folder.parent / "made", 1).save(1, make_engine(), {"progress": {"step": 1}})
    (folder.parent / "made" / "step-000000001").rename(folder)


def _dataset(folder: Path) -> None:
    import datasets

    images = [{"bytes": encode(tile), "path": None} for tile in random_tiles(3)]
    datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image()).save_to_disk(str(folder))


def _none(folder: Path) -> None:
    folder.mkdir()


def parts(folder: Path) -> Parts:
    return Parts(folder, {"encoder": "x"}, tiles=3, size=3, dim=2)


# made so that the place is a real one, the file that is then replaced, and who reads it
PLACES: dict[str, tuple[Callable[[Path], None], str, Callable[[Path], Any]]] = {
    "index": (_index, INDEX_NAME, ShardIndex),
    "manifest": (_index, MANIFEST_NAME, ShardIndex),
    "encoder weights": (_encoder, "encoder.safetensors", lambda f: resolve_encoder(str(f))),
    "encoder card": (_encoder, "card.json", lambda f: resolve_encoder(str(f))),
    "bare safetensors": (_none, "a.safetensors", lambda f: resolve_encoder(str(f / "a.safetensors"))),
    **{f"foreign {end}": (_none, f"a{end}", lambda f, end=end: resolve_encoder(str(f / f"a{end}")))
       for end in (".pth", ".tar", ".pt", ".pkl", ".ckpt", ".bin")},
    "detector weights": (_detector, WEIGHTS, lambda f: load_detector(f, "cpu")),
    "detector card": (_detector, CARD, lambda f: load_detector(f, "cpu")),
    "checkpoint weights": (_checkpoint, "model.safetensors", lambda f: restore(f, make_engine())),
    "checkpoint optimizer": (_checkpoint, "optimizer.safetensors", lambda f: restore(f, make_engine())),
    "checkpoint state": (_checkpoint, "state.json", read_state),
    "checkpoint pointer": (_none, "latest", lambda f: Checkpointer(f, 1).latest()),
    "run": (_none, "run.json", read_run),
    "job folder": (_none, "job.json", lambda f: JobDir(f, "job.json").changes({})),
    "fine-tuning predictions": (_none, "predictions.safetensors", read_predictions),
    "trial's result": (_none, "x.json", lambda f: read_fields(f / "x.json", (), "delete it")),
    "reproduced facts": (_none, "x.json", lambda f: read_facts(f / "x.json")),
    "coco": (_none, "x.json", lambda f: read_coco(f / "x.json")),
    "mask": (_none, "x.png", lambda f: read_mask(f / "x.png", (8, 8))),
    "dataset state": (_dataset, "state.json", lambda f: open_source(str(f))),
    "dataset info": (_dataset, "dataset_info.json", lambda f: open_source(str(f))),
    "dataset table": (_dataset, "data-00000-of-00001.arrow", lambda f: open_source(str(f))),
    "embedding part": (_none, "part-000000.parquet", lambda f: parts(f).read(parts(f)[0])),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_planted_file_is_refused_in_one_line_and_not_run(place: str, tmp_path: Path, bait: Bait) -> None:
    make, name, read = PLACES[place]
    make(tmp_path / "place")
    if not place.startswith(("checkpoint", "dataset")):  # reading the real thing takes seconds, or is tested elsewhere
        assert (tmp_path / "place").is_dir()
    for form, data in bait.forms.items():
        path = tmp_path / "place" / name
        path.unlink(missing_ok=True)  # it may be mapped
        path.write_bytes(data)
        with pytest.raises(InputError) as caught:
            read(tmp_path / "place")
        told = str(caught.value)
        assert "\n" not in told and str(tmp_path) in told, form
        assert not bait.sprung, form


def test_where_damage_is_passed_over_nothing_runs_either(tmp_path: Path, bait: Bait) -> None:
    for data in bait.forms.values():
        for name in ("journal.jsonl", "out.parquet", "out.safetensors", "part-000000.parquet"):
            (tmp_path / name).write_bytes(data + b"\n")
        assert list(read_journal(tmp_path / "journal.jsonl")) == []
        assert read_about(tmp_path / "out.parquet") is None and read_about(tmp_path / "out.safetensors") is None
        assert parts(tmp_path).facts(parts(tmp_path)[0]) is None
        text = data.decode("latin-1")
        material = RunMaterial(run_id="", name="", status="", files={"config.yaml": text, "environment.json": text})
        assert nested(material) == {} and material.document("environment.json") == {}
        with pytest.raises(BadSample):
            decode(data)


@pytest.mark.parametrize(("read", "error"), [(TORCHVISION.native, pickle.UnpicklingError), (TIMM.native, RuntimeError)])
def test_an_exported_file_is_read_back_without_running_it(
    read: Any, error: type[Exception], tmp_path: Path, bait: Bait
) -> None:
    for data in bait.forms.values():
        (tmp_path / "a.pth").write_bytes(data)
        with pytest.raises(error, match="(?i)weights.only"):
            read(tmp_path / "a.pth", ENCODER)


CONFIGURED = {
    "pretrain": ("data.shards", "--run.output_dir", "y", "--run.steps", "1"),
    "probe": ("train", "--encoder", "x", "--test", "z"),
    "finetune": ("train", "--encoder", "x", "--test", "z", "--output_dir", "o"),
    "embed": ("cache_dir", "--encoder", "x", "s", "o.parquet"),
    "export": ("encoder", "--to", "timm", "o"),
    "detect": ("data", "--dataset", "glas", "--output_dir", "o"),
    "report": ("shards", "x"),
}
"""For each verb a setting to be planted, and what it needs beside."""


@pytest.mark.parametrize("verb", CONFIGURED)
def test_a_configuration_file_runs_nothing(verb: str, tmp_path: Path, bait: Bait, capsys: Any) -> None:
    """Everything that the verb needs is given, and the planted value is a known setting's: it alone is refused."""
    setting, *others = CONFIGURED[verb]
    apply, file = bait.yaml.decode().partition(" ")[2], tmp_path / "x.yaml"
    planted = {"is a list: give one value": apply, "python/module:antigravity": "!!python/module:antigravity ''\n"}
    for reason, value in planted.items():
        *groups, name = setting.split(".")
        file.write_text("".join(f"{group}:\n  " for group in groups) + f"{name}: {value}")
        assert main([verb, *others, "--config", str(file)]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and f"line {len(groups) + 1}: {setting} " in told and reason in told, told
    for form, data in bait.forms.items():
        file.write_bytes(data)
        assert main([verb, *others, f"--{setting}", "x", "--config", str(file)]) == 2, form
        told = capsys.readouterr().err
        reason = "unknown setting x" if form == "yaml" else "cannot be read (unacceptable character"
        assert told.count("\n") == 1 and "x.yaml" in told and reason in told, told


def _extension(bait: Bait) -> pa.Field:
    """What pyarrow below 14 unpickled on sight (CVE-2023-47248)."""
    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": bait.pickle}
    return pa.field("key", pa.binary(), metadata=metadata)


def test_an_arrow_type_that_was_once_unpickled_is_not(tmp_path: Path, bait: Bait) -> None:
    _index(tmp_path / "shards")
    schema = pa.ipc.open_file(str(tmp_path / "shards" / INDEX_NAME)).schema
    table = pa.table([pa.array([b"x"])], pa.schema([_extension(bait)], metadata=schema.metadata))
    with pa.ipc.new_file(str(tmp_path / "new.arrow"), table.schema) as writer:
        writer.write_table(table)
    shutil.move(tmp_path / "new.arrow", tmp_path / "shards" / INDEX_NAME)
    with pytest.raises(InputError, match="damaged index"):
        ShardIndex(tmp_path / "shards")
    pq.write_table(table, tmp_path / "part-000000.parquet")
    with pytest.raises(InputError, match="cannot be read"):
        parts(tmp_path).read(parts(tmp_path)[0])


def test_what_a_stopped_sharding_left_is_not_run(tmp_path: Path, bait: Bait) -> None:
    tiles = tmp_path / "tiles" / "ADI"
    tiles.mkdir(parents=True)
    for number, tile in enumerate(random_tiles(3)):
        (tiles / f"{number}.png").write_bytes(encode(tile))
    arguments = ["shard", str(tiles.parent), str(tmp_path / "out"), "--workers", "1"]
    plan = tmp_path / "out" / ".plan"
    plan.mkdir(parents=True)
    (plan / "plan.json").write_bytes(bait.pickle)
    assert main(arguments) == 2
    (plan / "plan.json").unlink()
    (plan / "shard-000000.tar.json").write_bytes(bait.pickle)
    assert main(arguments) == 0 and len(ShardIndex(tmp_path / "out")) == 3


def test_the_weights_of_another_store_are_not_run(
    tmp_path: Path, bait: Bait, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A run's artifacts, and a registered model of the kind that MLflow itself unpickles."""
    from ca2cl.store.open import open_store

    store = open_store("", tmp_path_factory.getbasetemp() / "tracking-tests")  # shared: making one takes seconds
    run_id = str(store.client.create_run(store.experiment_id("x")).info.run_id)
    folder = tmp_path / "model"
    _encoder(folder / "good")
    flavour = {"loader_module": "mlflow.pyfunc.model", "python_model": "python_model.pkl", "cloudpickle_version": "3.0"}
    (folder / "MLmodel").write_text(json.dumps({"flavors": {"python_function": flavour}}))
    for name in ("python_model.pkl", "model.pth", "data.joblib"):
        (folder / name).write_bytes(bait.pickle)
    store.client.log_artifacts(run_id, str(folder), "encoder")
    store.client.create_registered_model("planted")
    where = f"{store.client.get_run(run_id).info.artifact_uri}/encoder"
    store.client.create_model_version("planted", where, run_id)
    assert resolve_encoder("models:/planted/1", tracking_uri=store.uri).card == ENCODER
    (folder / "good" / "encoder.safetensors").write_bytes(bait.torch_zip)
    store.client.log_artifacts(run_id, str(folder / "good"), "encoder")
    with pytest.raises(InputError, match="not a whole safetensors file"):
        resolve_encoder(run_id, tracking_uri=store.uri)


def test_members_of_a_tar_that_others_would_unpickle_are_only_bytes(tmp_path: Path, bait: Bait) -> None:
    """Three tiles, the last of which is a pickle by its extension and by its bytes."""
    from ca2cl.data.loading.stream import SampleSource, UndecodableError
    from ca2cl.data.remote.reader import ShardReader

    tiles = [encode(tile) for tile in random_tiles(2)]
    for ext in ("pyd", "pickle", "pth", "npy"):
        root = write_shards(tmp_path / ext, [*tiles, bait.forms["torch_zip" if ext == "pth" else "pickle"]], ext=ext)
        source = SampleSource(ShardIndex(root), ShardReader(root))
        out_HWC = np.zeros((16, 16, 3), np.uint8)
        source.fill(1, out_HWC)
        with pytest.raises(UndecodableError):
            source.fill(2, out_HWC)


def test_a_card_with_more_than_a_card_is_no_code(tmp_path: Path, bait: Bait) -> None:
    _encoder(tmp_path / "e")
    raw = {**asdict(ENCODER), "__reduce__": ["os.mkdir", str(bait.marker)], "py/reduce": [{"py/type": "os.mkdir"}]}
    (tmp_path / "e" / "card.json").write_text(json.dumps(raw))
    assert resolve_encoder(str(tmp_path / "e")).card == ENCODER
