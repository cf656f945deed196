"""``ca2cl encoders import``: a foreign encoder becomes a version with a run and a card, once, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from ca2cl.cli import main
from ca2cl.models.backbone import build_encoder
from ca2cl.models.encoder_io import EncoderCard, save_encoder
from ca2cl.registry.evaluation_run import log_evaluation
from ca2cl.registry.resolve import resolve_encoder
from ca2cl.store.open import Store, open_store
from tests.support.hub import COMMIT, Hub, Repo
from tests.support.servers import Server
from tests.support.shards import encode, random_tiles

NAME = "imported"


def weights(seed: int, arch: str = "resnet18") -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return build_encoder(arch).state_dict()


def authors(path: Path, state: dict[str, torch.Tensor]) -> Path:
    net = {f"module.resnet.{name}": tensor for name, tensor in state.items()}
    torch.save({"net": {**net, "module.group.weight": torch.zeros(2)}, "epoch": 3}, path)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store("", tmp_path_factory.getbasetemp() / "tracking-tests")  # shared: making one takes seconds


@pytest.fixture(scope="module")
def checkpoint(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The authors' checkpoint, imported as version 1."""
    path = authors(tmp_path_factory.mktemp("authors") / "last.tar", weights(21))
    assert main(["encoders", "import", str(path), *at(store)]) == 0
    yield path


def at(store: Store, name: str = NAME) -> list[str]:
    return ["--name", name, "--tracking.root", str(store.root), "--tracking.experiment", "imports"]


def imported(capfd: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    capfd.readouterr()
    assert main(["encoders", "import", *arguments]) == code
    out, error = capfd.readouterr()
    if code == 2:
        (line,) = error.splitlines()
        assert line.startswith("ca2cl: error: ") and not out
        return line
    return out


def shown(capfd: pytest.CaptureFixture[str], store: Store, what: str) -> dict[str, Any]:
    capfd.readouterr()
    assert main(["encoders", "show", what, "--json", *at(store)]) == 0
    answer: dict[str, Any] = json.loads(capfd.readouterr().out)
    return answer


def counts(store: Store) -> tuple[int, int]:
    """Runs and versions that there are."""
    runs = store.client.search_runs([store.experiment_id("imports")], max_results=1000)
    return len(runs), len(store.client.search_model_versions(f"name = '{NAME}'"))


def test_the_authors_checkpoint_becomes_a_version_with_a_run_and_a_card(
    store: Store, checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = resolve_encoder(f"models:/{NAME}/1", tracking_uri=store.uri)
    state = found.encoder.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights(21).items())
    card = found.card
    assert (card.origin, card.origin_sha256) == (str(checkpoint), sha256(checkpoint))
    run = store.client.get_run(found.source_run_id)
    assert run.info.status == "FINISHED" and run.data.tags["ca2cl.kind"] == "import"
    assert run.data.params["source"] == str(checkpoint) and run.data.params["source_sha256"] == sha256(checkpoint)
    assert shown(capfd, store, "champion")["lineage"]["source_run_id"] == found.source_run_id


def test_the_same_weights_again_are_the_same_version(
    store: Store, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = counts(store)
    save_file(weights(21), tmp_path / "again.safetensors")
    for source in (checkpoint, tmp_path / "again.safetensors"):
        assert imported(capfd, str(source), *at(store)).startswith(f"{NAME} 1 already has exactly these weights")
    assert counts(store) == before


def test_another_input_size_is_another_version_and_is_not_the_champion(
    store: Store, checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = imported(capfd, str(checkpoint), "--input_size", "96", *at(store))
    version = out.split(":")[0].split()[1]
    assert version != "1" and "champion" not in out and "resnet18, 96 px" in out
    assert resolve_encoder(f"models:/{NAME}/{version}", tracking_uri=store.uri).card.input_size == 96


def test_a_run_folder_keeps_its_card_and_names_the_run_that_trained_it(
    store: Store, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trained = "0123456789abcdef0123456789abcdef"
    card = EncoderCard(
        arch="resnet18", feature_dim=512, input_size=64, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2),
        manifest_digest="ab" * 32, step=9, source_run_id=trained,
    )  # fmt: skip
    folder = save_encoder(tmp_path / "run" / "encoder", weights(22), card)
    imported(capfd, str(tmp_path / "run"), *at(store))
    for source in (trained, None):  # what was measured before the import, and after it
        found = resolve_encoder(f"models:/{NAME}@latest", tracking_uri=store.uri)
        log_evaluation(
            source_run_id=source or found.source_run_id, name="probe", params={}, metrics={"accuracy": 0.5},
            artifacts=[], root=str(store.root), experiment="imports",
        )  # fmt: skip
    told = shown(capfd, store, "latest")
    assert told["card"]["origin_run_id"] == trained and told["card"]["step"] == 9
    assert told["card"]["mean"] == [0.5, 0.5, 0.5] and told["lineage"]["manifest_digest"] == "ab" * 32
    assert told["card"]["origin_sha256"] == sha256(folder / "encoder.safetensors")
    assert len(told["downstream"]) == 2


def test_torchvision_weights_are_named_by_the_published_files_digest(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Under the published file's name and place; a cached file is taken as it is, so its content may be another."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    path.parent.mkdir(parents=True)
    torch.save({**weights(23), "fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}, path)
    out = imported(capfd, "torchvision:IMAGENET1K_V1", *at(store))
    assert "from torchvision:IMAGENET1K_V1" in out and sha256(path) in out


def test_what_is_no_encoder_leaves_nothing_behind(
    store: Store, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lacking = authors(tmp_path / "lacking.pth", {k: v for k, v in weights(1).items() if "layer3" not in k})
    garbage = tmp_path / "garbage.pth"
    garbage.write_bytes(os.urandom(1000))
    before = counts(store)
    cut = tmp_path / "cut.safetensors"
    save_file(weights(1), cut)
    cut.write_bytes(cut.read_bytes()[:1000])
    for source, message in (
        (lacking, "90 of 120 backbone tensors fit, 25 missing"),
        (garbage, "not a file of plain tensors"),
        (cut, "not a whole safetensors file"),
        (tmp_path / "nothing.pth", "not there"),
        (tmp_path, "holds no encoder.safetensors"),
    ):
        assert message in imported(capfd, str(source), *at(store), code=2)
    assert "not a resnet50" in imported(capfd, str(checkpoint), "--arch", "resnet50", *at(store), code=2)
    assert counts(store) == before


def test_import_list_show_and_promote_over_http(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    server = Server(tmp_path)
    where = ["--tracking.uri", server.uri]
    try:
        server.start(patience=180)
        assert "no encoder is registered" in listed(capfd, *where)
        path = authors(tmp_path / "last.tar", weights(24))
        assert imported(capfd, str(path), *where).startswith("ca2cl-encoder 1: "), "stdout is for scripts to read"
        assert "ca2cl-encoder 1 already has" in imported(capfd, str(path), *where)
        assert "ca2cl-encoder 2" in imported(capfd, "random:5", "--input_size", "64", *where)
        runs = {record["version"]: record["source_run_id"] for record in json.loads(listed(capfd, "--json", *where))}
        for version, accuracy in ((1, 0.6), (2, 0.7)):
            log_evaluation(
                source_run_id=runs[version],
                name="probe",
                params={"encoder_uri": f"models:/ca2cl-encoder/{version}"},
                metrics={"encoder/accuracy": accuracy},
                artifacts=[],
                uri=server.uri,
            )
        assert main(["encoders", "promote", "2", "--if-better", "accuracy", *where]) == 0
        assert "ca2cl-encoder 2 0.7, ca2cl-encoder 1 0.6" in capfd.readouterr().out
        records = json.loads(listed(capfd, "--json", *where))
        assert [(r["version"], r["aliases"], r["best"]["accuracy"]["value"]) for r in records] == [
            (2, ["champion"], 0.7),
            (1, [], 0.6),
        ]
        assert main(["encoders", "show", "1", *where]) == 0
        assert sha256(path) in capfd.readouterr().out
        assert main(["encoders", "compare", "1", "2", *where]) == 0
        assert "encoder/accuracy  0.6000           0.7000" in capfd.readouterr().out
    finally:
        server.stop()


def listed(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    capfd.readouterr()
    assert main(["encoders", "list", *arguments]) == 0
    return capfd.readouterr().out


def test_a_classifier_is_imported_as_the_encoder_behind_its_head(
    store: Store, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """And not as one whose head is looked for when it is served."""
    import mlflow

    mean, std = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)
    card = EncoderCard(arch="resnet18", feature_dim=512, input_size=48, mean=mean, std=std, predicts=("a", "b"))
    state = {**weights(5), "fc.weight": torch.ones(2, 512), "fc.bias": torch.zeros(2)}
    folder = save_encoder(tmp_path / "classifier", state, card)
    imported(capfd, str(folder), *at(store, "headless"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(store.uri)
    model = mlflow.pyfunc.load_model("models:/headless/1")
    mlflow.set_tracking_uri(before)
    assert model.predict([encode(random_tiles(1, 48)[0])]).shape == (1, 512)


def test_weights_of_the_hub_are_registered_with_their_licence(
    store: Store, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    torch.manual_seed(8)
    state = build_encoder("timm:test_vit,reg_tokens=2", image_size=64).state_dict()
    config = {
        "architecture": "test_vit",
        "model_args": {"img_size": 64, "reg_tokens": 2},
        "pretrained_cfg": {"mean": [0.7, 0.6, 0.5], "std": [0.2, 0.2, 0.2], "input_size": [3, 64, 64]},
    }
    files = {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": save(state),
        "README.md": b"---\nlicense: cc-by-nc-nd-4.0\n---\n",
        "LICENSE": b"Creative Commons, of a kind\n",
    }
    with Hub() as hub:
        hub.repos["tissue/vit"] = Repo(files)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        told = imported(capfd, "hf-hub:tissue/vit", *at(store, "public"))
    digest = hashlib.sha256(files["model.safetensors"]).hexdigest()
    assert f"timm:test_vit,reg_tokens=2, 64 px, from hf-hub:tissue/vit@{COMMIT} (sha256 {digest})" in told
    found = resolve_encoder("models:/public/1", tracking_uri=store.uri)
    assert found.card.licence == "cc-by-nc-nd-4.0" and found.card.mean == (0.7, 0.6, 0.5)
    assert all(torch.equal(one, state[name]) for name, one in found.encoder.state_dict().items())
    assert main(["encoders", "show", "1", "--name", "public", "--tracking.root", str(store.root)]) == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert "licence cc-by-nc-nd-4.0" in shown and "Creative Commons, of a kind" in shown
    assert f"started from hf-hub:tissue/vit@{COMMIT}" in shown


def test_mean_and_std_are_given_for_a_file_that_states_none(
    store: Store, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = authors(tmp_path / "half.tar", weights(29))
    half = ["--mean", ".5", ".5", ".5", "--std", ".5", ".25", ".5", "--mpp", "0.5"]
    out = imported(capfd, str(path), *half, *at(store, "half"))
    assert out.startswith("half 1: resnet18")
    card = resolve_encoder("models:/half/1", root=store.root).card
    assert (card.mean, card.std, card.mpp) == ((0.5, 0.5, 0.5), (0.5, 0.25, 0.5), 0.5)
    assert "already has exactly these weights" in imported(capfd, str(path), *half, *at(store, "half"))
    again = imported(capfd, "models:/half/1", "--mean", ".4", ".5", ".5", "--std", ".5", ".5", ".5", *at(store), code=2)
    assert "mean is (0.4, 0.5, 0.5): the source states (0.5, 0.5, 0.5); leave it out" in again
    assert "mean is 127 127 127: use numbers from 0 to 1" in imported(
        capfd, str(path), "--mean", "127", "127", "127", "--std", "1", "1", "1", *at(store), code=2
    )
    assert "needs --std R G B as well" in imported(capfd, str(path), "--mean", ".5", ".5", ".5", *at(store), code=2)
