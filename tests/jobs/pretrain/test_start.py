"""A run from public weights: the first line, the card, MLflow and ``encoders show`` say where it started."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from ca2cl.cli import main
from ca2cl.models.backbone import build_encoder
from ca2cl.registry.resolve import resolve_encoder
from ca2cl.store.open import open_store
from tests.support.jobs import make_shards, pretrain

ARCH, SIDE = "timm:test_vit", 64
CONFIG = {"architecture": "test_vit", "pretrained_cfg": {"mean": [0.7, 0.6, 0.5], "std": [0.2, 0.25, 0.3], "mpp": 0.5}}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("start"), 10)


def dino(folder: Path) -> Path:
    """A checkpoint of DINO's for tiles of 64 pixels, with a configuration and a licence beside it."""
    torch.manual_seed(1)
    state = build_encoder(ARCH, image_size=SIDE).state_dict()
    folder.mkdir()
    teacher = {f"backbone.{name}": one for name, one in state.items()}
    torch.save({"teacher": teacher, "student": {}, "epoch": 3}, folder / "dino.pth")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "LICENSE").write_text("Tissue License\n\nNot for sale.\n")
    return folder / "dino.pth"


def test_a_run_says_what_it_started_from(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = dino(tmp_path / "public")
    job = (
        "--recipe", "smoke", "--data.shards", str(shards), "--data.image_size", "32", "--run.output_dir", "run",
        "--run.steps", "1", "--run.micro_batch_size", "16", "--model.arch", ARCH, "--model.weights", str(file),
        "--model.std", "[0.1, 0.1, 0.1]", "--model.pooling", "both", "--model.norm", "sync",
    )  # fmt: skip
    done = pretrain(tmp_path, *job)
    assert done.returncode == 0, done.stderr
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    tensors = len(build_encoder(ARCH).state_dict())
    layout = "DINO's, DINOv2's or DINOv3's teacher (in 'teacher', under backbone.*)"
    first, second = [line for line in done.stderr.splitlines() if line.strip()][:2]
    assert f"start: {ARCH} from {file}, {layout}, {tensors} tensors, sha256 {digest}" in first
    for words in (
        "tiles of 64 pixels",
        "mean 0.7 0.6 0.5 (the weights')",
        "std 0.1 0.1 0.1 (model.std)",
        "pooling both",
    ):
        assert words in second
    assert "licence Tissue License" in second

    found = resolve_encoder(str(tmp_path / "run"))
    card = found.card
    assert (card.start, card.start_layout, card.start_sha256) == (str(file), layout, digest)
    assert (card.mean, card.std, card.mpp, card.pooling) == ((0.7, 0.6, 0.5), (0.1, 0.1, 0.1), 0.5, "both")
    assert card.licence == "Tissue License" and card.licence_text == "Tissue License\n\nNot for sale."
    assert (card.input_size, card.feature_dim) == (32, 128)

    store = open_store("", tmp_path / "ca2cl-runs")
    assert card.source_run_id is not None
    run = store.client.get_run(card.source_run_id).data
    assert run.tags["ca2cl.start"] == str(file) and run.tags["ca2cl.start_sha256"] == digest
    assert run.tags["ca2cl.licence"] == "Tissue License"
    assert json.loads(run.params["model.mean"]) == [0.7, 0.6, 0.5]

    assert main(["encoders", "show", "latest", "--tracking.root", str(tmp_path / "ca2cl-runs")]) == 0
    told = " ".join(capsys.readouterr().out.split())
    for words in (f"started from {file} (DINO", digest, "licence Tissue License", "Not for sale.", "pooling both"):
        assert words in told
    record = tmp_path / "run" / "run.json"
    record.write_text(record.read_text().replace(ARCH, "timm/test_vit"))  # as earlier versions spelt it
    again = pretrain(tmp_path, *job)
    assert again.returncode == 0 and "nothing to do" in again.stderr
