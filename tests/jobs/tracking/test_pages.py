"""MLflow's pages of a run, a model and a data set in Chromium. Before a release, look at the pictures, too.

python docs/pictures/mlflow_pages.py STORE OUT makes them of any store.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image

from ca2cl.config import DataConfig, RunConfig, TrackingConfig
from ca2cl.data.remote.reader import open_index
from ca2cl.models.backbone import build_encoder
from ca2cl.models.encoder_io import EncoderCard, save_encoder
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.pretrain.description import describe_run
from ca2cl.registry.evaluation_run import log_evaluation
from ca2cl.store.inputs import describe_input
from ca2cl.tracking.run import open_run
from tests.support.jobs import ROOT
from tests.support.shards import encode, random_tiles, write_shards

SCRIPT = ROOT / "docs" / "pictures" / "mlflow_pages.py"
sys.path.insert(0, str(SCRIPT.parent))
browser = pytest.importorskip("browser")
CARD = EncoderCard(arch="resnet18", feature_dim=512, input_size=32, mean=(0.5,) * 3, std=(0.2,) * 3, step=2)


@pytest.mark.slow
@pytest.mark.skipif(browser.find_chromium() is None, reason="Chromium is not installed")
def test_the_pages_show_what_a_run_was_made_of(tmp_path: Path) -> None:
    """The script waits for the description, the data's digest, the logged model and the version's text on the pages."""
    shards = write_shards(tmp_path / "shards", [encode(tile) for tile in random_tiles(12)])
    manifest = open_index(shards).manifest
    config = PretrainConfig(
        data=DataConfig(shards=str(shards), lanes=8, workers=0),
        run=RunConfig(batch_size=16, steps=2),
        tracking=TrackingConfig(root=str(tmp_path / "store")),
    )
    tracker = open_run(tmp_path / "run", config, manifest=asdict(manifest))
    for step in (1, 2):
        tracker.log_step({"step": step, "loss": 1 / step})
    torch.manual_seed(0)
    encoder = save_encoder(tmp_path / "run" / "encoder", build_encoder().state_dict(), CARD)
    tracker.log_encoder(encoder, "ca2cl-encoder")
    tracker.describe(describe_run(config, manifest, 2, None, tracker.run_id))
    assert tracker.finish("FINISHED")
    log_evaluation(
        source_run_id=tracker.run_id, name="probe", params={}, metrics={"accuracy": 0.5}, artifacts=[],
        inputs=[describe_input(str(shards), asdict(manifest), "testing")], root=tmp_path / "store",
    )  # fmt: skip
    out = tmp_path / "pictures"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path / "store"), str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    names = {path.stem for path in out.iterdir()}
    assert names == {f"mlflow-{name}" for name in (
        "runs", "run", "metrics", "dataset", "artifacts", "model", "version", "evaluation"
    )}  # fmt: skip
    with Image.open(out / "mlflow-run.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 8
