"""What may choose a fine-tuned classifier: held-out tiles; and, in the authors' linear probe alone, the test tiles."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from ca2cl.cli import main
from ca2cl.data.decode import decode
from ca2cl.evaluation.finetune.best_checkpoint import keep
from ca2cl.evaluation.finetune.config import FinetuneConfig
from ca2cl.evaluation.finetune.run import _starts
from ca2cl.evaluation.finetune.trial import build_network
from ca2cl.evaluation.labelled import BY_SLIDES
from ca2cl.evaluation.splits import split_off
from ca2cl.models.backbone import build_encoder
from ca2cl.models.batch_norm import BatchNorm
from ca2cl.models.classifier import Classifier
from ca2cl.models.encoder_io import read_card
from ca2cl.models.preprocess import preprocess
from ca2cl.registry.resolve import resolve_encoder
from tests.jobs.registry.test_serving import post
from tests.support.servers import ModelServer
from tests.support.shards import encode, write_shards

SMALL = (
    "--encoder", "random:3", "--against", "[]", "--labels", ".75", "--epochs", "4", "--min_steps", "1",
    "--batch_size", "6", "--image_size", "32", "--workers", "0", "--norm", "frozen", "--held_out", "0.25",
)  # fmt: skip
CLASSES = ["blue", "green", "red"]
Job = Callable[..., Path]


def pictures(tiles: int, seed: int) -> list[bytes]:
    """Noise with a faint colour; tile i is of class i % 3."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(60, 180, (tiles, 40, 40, 3))
    pixels[np.arange(tiles), :, :, 2 - np.arange(tiles) % 3] += 30
    return [encode(tile.astype(np.uint8)) for tile in pixels]


def tissue(folder: Path, tiles: int, seed: int, labels: list[int] | None = None) -> str:
    return str(write_shards(folder, pictures(tiles, seed), labels=labels, classes=CLASSES, tile_size=(40, 40)))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Runs a job in this process and gives its folder; for the same options again its cells are there."""
    root = tmp_path_factory.mktemp("protocol")
    train = tissue(root / "train", 80, seed=0)
    wrong = np.random.default_rng(5).integers(0, 3, 30).tolist()
    tests = {"test": tissue(root / "test", 30, seed=1), "wrong": tissue(root / "wrong", 30, seed=1, labels=wrong)}

    def run(protocol: str, trains: str = "all", test: str = "test", *more: str) -> Path:
        out = root / f"{protocol}-{trains}-{test}"
        if more or not (out / "finetune-results.json").exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.delenv("MLFLOW_TRACKING_URI", raising=False)
                where = ("--train", train, "--test", tests[test], "--output_dir", str(out))
                store = ("--tracking.root", str(root / "store"))
                seeds = ("--seeds", "2" if test == "test" else "1")
                how = ("--protocol", protocol, "--trains", trains)
                assert main(["finetune", *where, *store, *how, *SMALL, *seeds, *more]) == 0
        return out

    return run


def cells(folder: Path) -> list[tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]]:
    """Result, arrays and journal of every seed."""
    return [
        (
            json.loads((cell / "result.json").read_text()),
            load_file(cell / "predictions.safetensors"),
            [json.loads(line) for line in (cell / "journal.jsonl").read_text().splitlines()],
        )
        for cell in sorted((folder / "cells").iterdir())
    ]


def test_labels_are_drawn_with_replacement_by_the_original_protocol_alone(job: Job) -> None:
    for protocol, count, repeated in (("honest", 60, False), ("original", 45, True)):
        for _, arrays, _ in cells(job(protocol)):
            assert len(arrays["labelled"]) == count
            assert (len(set(arrays["labelled"].tolist())) < count) == repeated


def test_the_original_protocol_chooses_by_tiles_that_were_split_off_before_labels_were_drawn(job: Job) -> None:
    for result, _, _ in cells(job("honest")):
        assert result["held_out"] == 15 and result["chosen_by"] == "tiles of any slide"
    for seed, (result, arrays, _) in enumerate(cells(job("original"))):
        assert result["held_out"] == 20 and result["chosen_by"] == "tiles split off before labels were drawn"
        assert not set(arrays["labelled"].tolist()) & set(np.flatnonzero(split_off(80, 0.25, seed)).tolist())
        assert result["steps"] % 8 == 0, "45 tiles are seven batches of six and one of three"


def test_the_original_protocol_takes_the_last_of_the_most_accurate_epochs(job: Job) -> None:
    for trains, title in (("all", "held_out"), ("head", "test")):
        for result, arrays, journal in cells(job("original", trains)):
            looks = [line for line in journal if line.get("event") == title]
            assert [look["epoch"] for look in looks] == list(range(4)), "a look an epoch"
            best = max(reversed(looks), key=lambda look: look["accuracy"])
            assert result["best_epoch"] == best["epoch"] and not looks[-1]["accuracy"] > best["accuracy"]
            right = (arrays["probabilities"].argmax(1) == arrays["labels"]).mean()
            assert result["scores"]["accuracy"] == pytest.approx(right)
            assert title == "held_out" or right == pytest.approx(best["accuracy"])


def test_test_labels_have_no_say_but_in_the_original_linear_probe(job: Job) -> None:
    for protocol, trains, same in (("honest", "all", True), ("original", "all", True), ("original", "head", False)):
        right, wrong = cells(job(protocol, trains))[0], cells(job(protocol, trains, "wrong"))[0]
        assert np.array_equal(right[1]["probabilities"], wrong[1]["probabilities"]) == same, (protocol, trains)
        looked = [line for line in right[2] if line.get("event") == "test"]
        assert bool(looked) != same and (right[0]["chosen_by"] == "the test tiles") != same


def test_an_original_result_says_what_it_is_wherever_it_is_shown(
    job: Job, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    for trains, told in (("all", "the test tiles were predicted once"), ("head", "the test tiles chose the model")):
        folder = job("original", trains, "test", "--tracking.run_name", "again")
        out = capfd.readouterr().out
        assert told in out and "for comparison with the authors' table alone" in out
        assert "logged as MLflow run" in out and " already\n" in out, "a finished job was logged again"
        content = json.loads((folder / "finetune-results.json").read_text())
        assert content["protocol"]["name"] == "original" and told in content["protocol"]["statement"]
        assert not list(folder.glob("cells/*/classifier")), "a classifier for comparison alone was kept"
    assert json.loads((job("honest") / "finetune-results.json").read_text())["protocol"]["statement"] == ""


def test_a_head_is_trained_alone_on_a_body_whose_batch_norm_is_in_train_mode() -> None:
    config = FinetuneConfig(encoder="random:3", train="", test="", output_dir="", protocol="original", trains="head")
    network = build_network(config, _starts(config)["encoder"], 0, classes=3)
    assert {name for name, parameter in network.named_parameters() if parameter.requires_grad} == {
        "head.weight", "head.bias",
    }  # fmt: skip
    assert network.head.weight.abs().max() > 0, "theirs starts as torch starts it"
    assert network.training and all(layer.norm == "sync" for layer in network.modules() if isinstance(layer, BatchNorm))


def test_an_original_classifier_is_not_registered(job: Job, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError, match="assert 2 == 0"):
        job("original", "all", "test", "--tracking.register_as", "ca2cl-classifier")
    assert "tracking.register_as is for the honest protocol" in capfd.readouterr().err


def test_the_best_held_out_classifier_stays_is_registered_and_served(
    job: Job, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    folder = job("honest", "all", "test", "--tracking.register_as", "ca2cl-classifier")
    assert "registered as models:/ca2cl-classifier/1" in capfd.readouterr().out
    (kept,) = folder.glob("cells/*/classifier")
    held = {cell.name: json.loads((cell / "result.json").read_text()) for cell in (folder / "cells").iterdir()}
    assert kept.parent.name == min(held, key=lambda name: held[name]["held_out_loss"])

    arrays = load_file(kept.parent / "predictions.safetensors")
    images = pictures(30, seed=1)[:5]
    uri = f"sqlite:///{folder.parent / 'store' / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # which MLflow would set as well, and leave
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    frame = mlflow.pyfunc.load_model("models:/ca2cl-classifier/1").predict(images)
    mlflow.set_tracking_uri(before)
    assert list(frame.columns) == ["prediction", *(f"probability_{name}" for name in CLASSES)]
    assert held[kept.parent.name]["temperature"] != 1, "of single tiles, whose slides are not known: not applied"
    assert json.loads((kept / "card.json").read_text())["metrics"]["temperature"] is None
    np.testing.assert_allclose(frame.iloc[:, 1:].to_numpy(), arrays["probabilities"][:5], atol=1e-5)
    assert frame["prediction"].tolist() == [CLASSES[k] for k in arrays["probabilities"][:5].argmax(1)]

    server = ModelServer(tmp_path, "models:/ca2cl-classifier/1", uri)
    try:
        server.start(patience=180)
        status, answer = post(server, {"inputs": [base64.b64encode(image).decode() for image in images]})
        assert status == 200 and [row["prediction"] for row in answer["predictions"]] == frame["prediction"].tolist()
        status, answer = post(server, {"inputs": ["no image"]})
        assert status == 400 and "image in row 0" in json.dumps(answer)
    finally:
        server.stop()

    # What is registered is an encoder as well, the one behind the head.
    found = resolve_encoder("models:/ca2cl-classifier/1", tracking_uri=uri)
    weights = load_file(kept / "encoder.safetensors")
    x = preprocess(torch.from_numpy(decode(images[0]))[None], 32, found.card.mean, found.card.std)
    with torch.inference_mode():
        logits = found.encoder(x).numpy() @ weights["fc.weight"].T + weights["fc.bias"]
    assert logits.argmax() == arrays["probabilities"][0].argmax() and found.card.predicts == tuple(CLASSES)


def test_a_temperature_of_whole_slides_is_in_the_weights_that_stay(job: Job, tmp_path: Path) -> None:
    """Serving, export and heat-maps read them."""
    card = read_card(next(job("honest").glob("cells/*/classifier")) / "card.json")
    network = Classifier(build_encoder("resnet18"), 2)
    torch.nn.init.normal_(network.head.weight)
    facts = {"steps": 7, "held_out_loss": 0.5, "held_out_accuracy": 0.8, "temperature": 2.5}
    for chosen_by, scale in ((BY_SLIDES, 2.5), ("tiles of any slide", 1.0)):
        keep(tmp_path, network, card, {**facts, "chosen_by": chosen_by})
        weights = load_file(tmp_path / "classifier" / "encoder.safetensors")
        np.testing.assert_allclose(weights["fc.weight"], network.head.weight.detach() / scale, rtol=1e-6)
        kept = read_card(tmp_path / "classifier" / "card.json").metrics["temperature"]
        assert kept == (scale if scale != 1 else None)


def test_a_cell_cut_short_leaves_no_classifier_that_counts(job: Job, tmp_path: Path) -> None:
    """What a kill may leave: weights of a cell that has no result yet, and half a card."""
    from ca2cl.evaluation.finetune.best_checkpoint import keep_best

    for name in ("a", "b"):
        shutil.copytree(next(job("honest").glob("cells/*/classifier")), tmp_path / name / "classifier")
    (tmp_path / "a" / "classifier" / "card.json").write_text('{"arch": ')
    assert keep_best([tmp_path / "a", tmp_path / "b", tmp_path / "c"]) == tmp_path / "b" / "classifier"
    assert not (tmp_path / "a" / "classifier").exists()
    assert keep_best([tmp_path / "c"]) is None
