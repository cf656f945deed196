"""``ca2cl encoders list | show | compare | promote`` on a real store with real versions and downstream runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from ca2cl.cli import main
from ca2cl.evaluation.protocol import ORIGINAL_STATEMENT
from ca2cl.models.backbone import build_encoder
from ca2cl.models.encoder_io import EncoderCard, save_encoder
from ca2cl.registry.evaluation_run import log_evaluation
from ca2cl.registry.register import log_and_register
from ca2cl.store.open import Store, open_store

TRAIN, TEST, OTHER_TEST = "11" * 32, "22" * 32, "33" * 32
CARD = EncoderCard(
    arch="resnet18",
    feature_dim=512,
    input_size=96,
    mean=(0.5, 0.4, 0.6),
    std=(0.2, 0.3, 0.25),
    manifest_digest="ab" * 32,
    config_digest="cd" * 32,
    commit="ef" * 20,
    step=828,
    metrics={"loss": 1.25},
)
BETTER = "linear/100pct/accuracy"


class Shelf(NamedTuple):
    """A store whose model ``shelf`` has the versions 1, 2, 3 and the runs that they came from."""

    store: Store
    runs: list[str]
    downstream: dict[str, str]

    @property
    def at(self) -> list[str]:
        return ["--name", "shelf", "--tracking.root", str(self.store.root)]


def scores(linear: float, loss: float) -> dict[str, float]:
    return {
        "encoder/linear/100pct/accuracy": linear,
        "encoder/linear/100pct/accuracy_sd": 0.01,
        "encoder/linear/100pct/accuracy_high": 0.999,
        "encoder/k-NN/100pct/accuracy": 0.5,
        "encoder/linear/100pct/loss": loss,
        "random_encoder/linear/100pct/accuracy": 0.98,
    }


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    store = open_store("", tmp_path_factory.getbasetemp() / "tracking-tests")  # shared: making one takes seconds
    experiment, runs = store.experiment_id("shelf"), []
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        run_id = str(store.client.create_run(experiment, run_name=f"training {seed}").info.run_id)
        store.client.log_param(run_id, "views.recipe", "crop")
        card = dataclasses.replace(CARD, source_run_id=run_id)
        folder = save_encoder(tmp_path_factory.mktemp("encoder"), build_encoder().state_dict(), card)
        assert log_and_register(run_id, folder, "shelf", store) == str(seed)
        store.client.set_terminated(run_id, "FINISHED")
        runs.append(run_id)
    downstream = {
        "old": evaluated(store, runs[0], 1, scores(0.7, 0.9)),
        "1": evaluated(store, runs[0], 1, scores(0.8, 0.4)),
        "2": evaluated(store, runs[1], 2, scores(0.9, 0.6), seeds=3),
        "2, elsewhere": evaluated(store, runs[1], 2, scores(0.95, 0.6), test=OTHER_TEST),
    }
    return Shelf(store, runs, downstream)


def evaluated(
    store: Store, source: str, version: int, metrics: dict[str, float], test: str = TEST, seeds: int = 5
) -> str:
    return log_evaluation(
        source_run_id=source,
        name="probe",
        params={"encoder_uri": f"models:/shelf/{version}", "seeds": seeds, "batch_size": version},
        metrics=metrics,
        artifacts=[],
        tags={
            "ca2cl.kind": "probe",
            "ca2cl.train_manifest_digest": TRAIN,
            "ca2cl.test_manifest_digest": test,
        },
        root=str(store.root),
        experiment="shelf",
    )


def told(capfd: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    capfd.readouterr()
    assert main(["encoders", *arguments]) == code
    out, error = capfd.readouterr()
    if code != 2:
        return out
    (line,) = error.splitlines()
    assert line.startswith("ca2cl: error: ") and not out
    return line


def holder(shelf: Shelf, alias: str) -> str | None:
    version = shelf.store.client.get_registered_model("shelf").aliases.get(alias)
    return None if version is None else str(version)


def test_list_has_a_row_for_every_version_newest_first(shelf: Shelf, capfd: pytest.CaptureFixture[str]) -> None:
    lines = told(capfd, "list", *shelf.at).splitlines()
    assert lines[0].split()[6:8] == ["views", "data"]  # no --recipe
    cells = [line.split() for line in lines[2:]]
    assert [row[1] for row in cells] == ["3", "2", "1"]
    for row, run_id in zip(cells, reversed(shelf.runs), strict=True):
        assert row[3:9] == ["resnet18", "828", "96", "crop", "abababab", run_id[:8]]
    assert "champion" in lines[4] and "champion" not in lines[2]
    assert lines[2].endswith("-") and "0.8000 (probe linear/100pct, test 22222222)" in lines[4]
    assert "0.9500 (probe linear/100pct, test 33333333)" in lines[3], "not the floor's .98 and not the interval's .999"
    assert "best AP" not in lines[0]


def test_list_of_every_name_and_as_json(shelf: Shelf, capfd: pytest.CaptureFixture[str]) -> None:
    records = json.loads(told(capfd, "list", "--json", "--metrics", "loss", "--tracking.root", str(shelf.store.root)))
    mine = [record for record in records if record["name"] == "shelf"]
    assert [record["version"] for record in mine] == [3, 2, 1]
    one = mine[2]
    assert one["source_run_id"] == shelf.runs[0] and one["manifest_digest"] == "ab" * 32
    assert one["aliases"] == ["champion"] and one["input_size"] == 96 and one["downstream_runs"] == 2
    assert one["best"]["loss"] == {
        "value": 0.4,
        "metric": "encoder/linear/100pct/loss",
        "kind": "probe",
        "test_manifest_digest": TEST,
        "run_id": shelf.downstream["1"],
    }


def test_an_empty_registry_says_how_to_get_one_and_looking_makes_no_store(
    tmp_path: Path, shelf: Shelf, capfd: pytest.CaptureFixture[str]
) -> None:
    out = told(capfd, "list", "--tracking.root", str(tmp_path / "none"))
    assert "no encoder is registered" in out and "ca2cl pretrain" in out and "encoders import" in out
    assert told(capfd, "list", "--json", "--tracking.root", str(tmp_path / "none")) == "[]\n"
    assert "no encoder is registered as other" in told(capfd, "list", "--name", "other", *shelf.at[2:])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "form", ["1", "champion", "models:/shelf/1", "models:/shelf@champion", "RUN", "runs:/RUN", "R"]
)
def test_show_takes_every_name_of_an_encoder(shelf: Shelf, form: str, capfd: pytest.CaptureFixture[str]) -> None:
    what = form.replace("RUN", shelf.runs[0]).replace("R", shelf.runs[0][:8])
    shown = json.loads(told(capfd, "show", what, "--json", *shelf.at))
    assert shown["uri"] == "models:/shelf/1" and shown["aliases"] == ["champion"]
    assert shown["card"]["config_digest"] == "cd" * 32 and shown["card"]["mean"] == [0.5, 0.4, 0.6]
    lineage = shown["lineage"]
    assert (lineage["source_run_id"], lineage["source_run_status"]) == (shelf.runs[0], "FINISHED")
    assert (lineage["commit"], lineage["views_recipe"]) == ("ef" * 20, "crop")
    assert [run["run_id"] for run in shown["downstream"]] == [shelf.downstream["1"], shelf.downstream["old"]]
    assert shown["downstream"][0]["metrics"]["encoder/linear/100pct/accuracy"] == 0.8


def test_show_is_readable(shelf: Shelf, capfd: pytest.CaptureFixture[str]) -> None:
    out = told(capfd, "show", "latest", *shelf.at)
    assert out.startswith("shelf 3 (models:/shelf/3)")
    for part in ("resnet18, 512 features, 96 px", "828 steps, last loss 1.2500", "ab" * 32, "cd" * 32, "ef" * 20):
        assert part in out
    assert f"{shelf.runs[2]} (training 3, FINISHED)" in out and "No downstream run" in out
    out = told(capfd, "show", "2", *shelf.at)
    assert out.count("probe, train 11111111") == 2 and "0.9000 ± 0.0100" in out and "random_encoder" not in out


def test_a_run_that_was_trained_further_keeps_its_versions_scores_apart(
    shelf: Shelf, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = shelf.store
    run_id = str(store.client.create_run(store.experiment_id("shelf")).info.run_id)
    for seed in (5, 6):
        torch.manual_seed(seed)
        folder = save_encoder(tmp_path / str(seed), build_encoder().state_dict(), CARD)
        log_and_register(run_id, folder, "further-listed", store)
        log_evaluation(
            source_run_id=run_id, name="probe", params={"encoder_uri": f"models:/further-listed/{seed - 4}"},
            metrics={"accuracy": seed / 10}, artifacts=[], root=str(store.root), experiment="shelf",
        )  # fmt: skip
    records = json.loads(told(capfd, "list", "--json", "--name", "further-listed", *shelf.at[2:]))
    assert [record["best"]["accuracy"]["value"] for record in records] == [0.6, 0.5]


def test_compare_puts_only_comparable_runs_side_by_side(shelf: Shelf, capfd: pytest.CaptureFixture[str]) -> None:
    lines = told(capfd, "compare", "1", "2", "3", *shelf.at).splitlines()
    assert lines[0] == "probe, train 11111111, test 22222222"
    rows = {line.split()[0]: line for line in lines[3:] if line.startswith("encoder/")}
    assert rows["encoder/linear/100pct/accuracy"].split()[1:] == ["0.8000", "±", "0.0100", "0.9000", "±", "0.0100", "-"]
    assert not any("_sd" in name or "_high" in name for name in rows)
    assert "note: seeds was not the same: shelf 1 5, shelf 2 3" in lines and "batch_size" not in "".join(lines)
    assert "not comparable: probe, train 11111111, test 33333333: only shelf 2 has it" in lines
    assert lines[-1] == "shelf 3 has no downstream run"


def test_compare_as_json_and_by_one_metric(shelf: Shelf, capfd: pytest.CaptureFixture[str]) -> None:
    (group,) = json.loads(told(capfd, "compare", "1", "2", "--metric", BETTER, "--json", *shelf.at))
    assert group["metrics"] == {f"encoder/{BETTER}": {"shelf 1": 0.8, "shelf 2": 0.9}}
    assert group["runs"] == {"shelf 1": shelf.downstream["1"], "shelf 2": shelf.downstream["2"]}


def test_compare_says_plainly_that_nothing_is_comparable(shelf: Shelf, capfd: pytest.CaptureFixture[str]) -> None:
    assert told(capfd, "compare", "1", "3", *shelf.at).startswith("nothing is comparable")


def test_promote_moves_an_alias_only_as_told(shelf: Shelf, capfd: pytest.CaptureFixture[str]) -> None:
    assert holder(shelf, "champion") == "1"
    out = told(capfd, "promote", "2", "--alias", "trial", "--if-better", BETTER, *shelf.at)
    assert out == "promoted: shelf 2 is trial now (nobody had it)\n" and holder(shelf, "trial") == "2"
    out = told(capfd, "promote", "1", "--alias", "trial", "--if-better", BETTER, *shelf.at)
    assert out.startswith("kept: trial stays with shelf 2") and "shelf 1 0.8, shelf 2 0.9" in out
    told(capfd, "promote", "1", "--alias", "trial", "--if-better", BETTER, "--exit-code", *shelf.at, code=3)
    assert holder(shelf, "trial") == "2"
    # less of a loss is better: here version 1 has less
    out = told(capfd, "promote", "1", "--alias", "trial", "--if-better", "loss", *shelf.at)
    assert out.startswith("promoted: shelf 1 is trial now (before shelf 2)") and "shelf 1 0.4, shelf 2 0.6" in out
    assert holder(shelf, "trial") == "1"
    out = told(capfd, "promote", "3", "--alias", "trial", *shelf.at)  # without a metric, always
    assert out == "promoted: shelf 3 is trial now (before shelf 1)\n" and holder(shelf, "trial") == "3"
    assert told(capfd, "promote", "3", "--alias", "trial", *shelf.at).startswith("kept: shelf 3 is trial already")


def test_promote_against_another_alias(shelf: Shelf, capfd: pytest.CaptureFixture[str]) -> None:
    out = told(capfd, "promote", "2", "--alias", "rival", "--if-better", "loss", "--than", "champion", *shelf.at)
    assert out.startswith("kept: rival stays with nobody") and holder(shelf, "rival") is None
    out = told(capfd, "promote", "2", "--alias", "rival", "--if-better", BETTER, "--than", "champion", *shelf.at)
    assert out.startswith("promoted: shelf 2 is rival now") and holder(shelf, "rival") == "2"
    assert holder(shelf, "champion") == "1"


def test_a_metric_that_is_level_is_not_better(shelf: Shelf, capfd: pytest.CaptureFixture[str]) -> None:
    out = told(capfd, "promote", "2", "--if-better", "k-NN/100pct/accuracy", *shelf.at)
    assert out.startswith("kept: champion") and holder(shelf, "champion") == "1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "9"), "has no version 9: there are 1, 2, 3"),
        (("show", "champoin"), "no alias 'champoin': did you mean champion?"),
        (("show", "models:/shelf/1/2"), "models:/NAME/VERSION"),
        (("show", "0" * 32), "check the id"),
        (("show", "DOWNSTREAM"), "has no encoder yet"),
        (("compare", "1", "champion"), "1 and champion are both shelf 1"),
        (("compare", "1", "2", "--metric", "acuracy"), "did you mean accuracy?"),
        (("promote", "9"), "has no version 9"),
        (("promote", "2", "--if-better", "acuracy"), "no metric that both have; did you mean"),
        (("promote", "2", "--if-better", "accuracy"), "fits 2 metrics"),
        (("promote", "3", "--if-better", "accuracy"), "nothing is comparable, shelf 3 has no downstream run"),
        (("promote", "2", "--if-better", "accuracy", "--than", "nobody"), "no alias 'nobody'"),
        (("promote", "DOWNSTREAM"), "is no registered version"),
    ],
)
def test_a_mistake_is_one_line_and_moves_nothing(
    shelf: Shelf, arguments: tuple[str, ...], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    before = shelf.store.client.get_registered_model("shelf").aliases
    words = [word.replace("DOWNSTREAM", shelf.downstream["1"]) for word in arguments]
    assert message in told(capfd, *words, *shelf.at, code=2)
    assert shelf.store.client.get_registered_model("shelf").aliases == before


def test_a_misspelt_name_and_an_unreachable_store(shelf: Shelf, capfd: pytest.CaptureFixture[str]) -> None:
    assert "did you mean shelf?" in told(capfd, "show", "1", "--name", "shelv", *shelf.at[2:], code=2)
    for verb in (("list",), ("show", "1"), ("compare", "1", "2"), ("promote", "1"), ("import", "random")):
        line = told(capfd, *verb, "--tracking.uri", "http://127.0.0.1:9", code=2)
        assert "cannot be used: connection refused" in line, line


def test_what_the_test_tiles_chose_ranks_no_encoder(
    shelf: Shelf, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two versions of a model of their own, the better one measured by the original protocol alone."""
    store, name = shelf.store, ["--name", "protocols", "--tracking.root", str(shelf.store.root)]
    sources = []
    for number in ("1", "2"):
        source = str(store.client.create_run(store.experiment_id("shelf")).info.run_id)
        folder = save_encoder(
            tmp_path / number, build_encoder().state_dict(), dataclasses.replace(CARD, source_run_id=source)
        )
        assert log_and_register(source, folder, "protocols", store) == number
        sources.append(source)

    def measured(number: int, accuracy: float, protocol: str) -> None:
        tags = {"ca2cl.kind": "probe", "ca2cl.train_manifest_digest": TRAIN, "ca2cl.test_manifest_digest": TEST}
        log_evaluation(
            source_run_id=sources[number - 1],
            name="probe",
            params={"encoder_uri": f"models:/protocols/{number}"},
            metrics=scores(accuracy, 0.5),
            artifacts=[],
            tags={**tags, "ca2cl.protocol": protocol} if protocol else tags,
            root=str(store.root),
            experiment="shelf",
        )

    told(capfd, "promote", "1", *name)
    measured(1, 0.7, "")
    measured(2, 0.9, ORIGINAL_STATEMENT)
    line = told(capfd, "promote", "2", "--if-better", BETTER, *name, code=2)
    assert "nothing is comparable" in line and "protocol original" in line
    assert "nothing is comparable" in told(capfd, "compare", "1", "2", *name)
    measured(1, 0.8, ORIGINAL_STATEMENT)
    line = told(capfd, "promote", "2", "--if-better", BETTER, *name, code=2)
    assert "measured by protocol original alone" in line
    assert "probe, train 11111111, test 22222222, protocol original\n" in told(capfd, "compare", "1", "2", *name)
    records = {one["version"]: one for one in json.loads(told(capfd, "list", "--json", *name))}
    assert records[2]["best"]["accuracy"] is None and records[1]["best"]["accuracy"]["value"] == 0.7
    measured(2, 0.6, "honest")
    assert told(capfd, "promote", "2", "--if-better", BETTER, *name).startswith("kept")
    assert str(store.client.get_registered_model("protocols").aliases["champion"]) == "1"


def test_a_run_with_a_leak_promotes_nothing(shelf: Shelf, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Slides shared by train and test, and a test on the very shards that an encoder was trained on."""
    store, name = shelf.store, ["--name", "leaks", "--tracking.root", str(shelf.store.root)]
    sources = []
    for number, digest in (("1", TRAIN), ("2", OTHER_TEST)):
        source = str(store.client.create_run(store.experiment_id("shelf")).info.run_id)
        card = dataclasses.replace(CARD, source_run_id=source, manifest_digest=digest)
        folder = save_encoder(tmp_path / number, build_encoder().state_dict(), card)
        assert log_and_register(source, folder, "leaks", store) == number
        sources.append(source)

    def measured(number: int, accuracy: float, test: str, leak: str = "") -> None:
        tags = {"ca2cl.kind": "probe", "ca2cl.train_manifest_digest": TRAIN, "ca2cl.test_manifest_digest": test}
        log_evaluation(
            source_run_id=sources[number - 1],
            name="probe",
            params={"encoder_uri": f"models:/leaks/{number}"},
            metrics=scores(accuracy, 0.5),
            artifacts=[],
            tags={**tags, "ca2cl.leak": leak} if leak else tags,
            root=str(store.root),
            experiment="shelf",
        )

    told(capfd, "promote", "1", *name)
    measured(1, 0.7, TEST, "shared slides")
    measured(2, 0.9, TEST, "shared slides")
    line = told(capfd, "promote", "2", "--if-better", BETTER, *name, code=2)
    assert "both were measured with a leak (shared slides) alone" in line and "that neither has seen" in line
    assert "test 22222222, LEAK (shared slides)\n" in told(capfd, "compare", "1", "2", *name)
    measured(1, 0.7, OTHER_TEST)
    measured(2, 0.9, OTHER_TEST)  # its own training shards, though an earlier version did not say so
    line = told(capfd, "promote", "2", "--if-better", BETTER, *name, code=2)
    assert "measured with a leak" in line
    assert "LEAK (encoder trained on the test shards): only leaks 2 has it" in told(capfd, "compare", "1", "2", *name)
    records = {one["version"]: one for one in json.loads(told(capfd, "list", "--json", *name))}
    assert records[2]["best"]["accuracy"] is None and records[1]["best"]["accuracy"]["value"] == 0.7
    measured(2, 0.6, TEST)
    measured(1, 0.65, TEST)
    assert told(capfd, "promote", "2", "--if-better", BETTER, *name).startswith("kept")
