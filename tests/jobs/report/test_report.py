"""``ca2cl report``: a real run, a real store and a real probe, and the page taken apart again."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from ca2cl.cli import main
from ca2cl.config import TrackingConfig
from ca2cl.data.loading.sequential import iterate_tiles
from ca2cl.data.remote.reader import ShardReader
from ca2cl.data.shards.index import ShardIndex
from ca2cl.evaluation.clusters import cluster
from ca2cl.evaluation.probe.run import ProbeConfig
from ca2cl.evaluation.probe.run import run as probe
from ca2cl.evaluation.protocol import ORIGINAL_STATEMENT
from ca2cl.models.preprocess import preprocess
from ca2cl.registry.evaluation_run import log_evaluation
from ca2cl.registry.resolve import resolve_encoder
from ca2cl.report.material import read_material
from ca2cl.report.results import results
from ca2cl.store.open import open_store
from tests.support.jobs import make_shards
from tests.support.pages import Page
from tests.support.runs import NAME, SIZE, write_run
from tests.support.shards import encode, random_tiles, write_shards

HOSTILE = "</script><script>alert(1)</script>"
OUT = "{tmp}/x.html"


class Job(NamedTuple):
    """A finished run that was probed."""

    folder: Path
    run_id: str
    train: Path
    test: Path
    root: str


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("report")
    root = str(tmp_path_factory.getbasetemp() / "tracking-tests")  # shared: making one takes seconds
    train, test = make_shards(folder, 4), make_shards(folder, 3, seed=1)
    tracker = write_run(folder / "run", root, train)
    tracker.log_encoder(folder / "run" / "encoder", NAME)
    assert tracker.finish("FINISHED")
    settings = ProbeConfig(
        encoder=tracker.run_id, train=str(train), test=str(test), labels=(1.0,), seeds=2, workers=0, imagenet=False,
        output=str(folder / "probe.json"), tracking=TrackingConfig(root=root),
    )  # fmt: skip
    assert probe(settings) == 0
    return Job(folder / "run", tracker.run_id, train, test, root)


def report(job: Job, out: Path, *arguments: str, run: str | None = None, log: bool = False) -> Page:
    where = ["--tracking.root", job.root, "--workers", "0", *([] if log else ["--no-log"]), *arguments]
    assert main(["report", run or job.run_id, str(out), *where]) == 0
    return Page(out)


@pytest.fixture(scope="module")
def page(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of the run with the test tiles, by its registered name, and logged."""
    out = tmp_path_factory.mktemp("page") / "new" / "crc.html"
    return report(job, out, "--test", str(job.test), "--clusters", "4", run=f"models:/{NAME}@latest", log=True)


@pytest.fixture(scope="module")
def features(job: Job) -> dict[str, tuple[np.ndarray, str]]:
    """Centred unit features and class of every test tile by key, one tile at a time."""
    index, found = ShardIndex(job.test), resolve_encoder(str(job.folder))
    made = {}
    for tile, (label,), (number,) in iterate_tiles(index, ShardReader(job.test), batch_size=1):
        shard, row = index.locate(number)
        with torch.inference_mode():
            batch = preprocess(tile, SIZE, found.card.mean, found.card.std)
            made[index.samples(shard).key[row]] = (found.encoder(batch)[0].double().numpy(), index.classes[label])
    mean = sum(vector for vector, _ in made.values()) / len(made)
    moved = {key: (vector - mean, name) for key, (vector, name) in made.items()}
    return {key: (vector / math.sqrt(math.fsum(vector**2)), name) for key, (vector, name) in moved.items()}


def test_the_page_loads_nothing_and_runs_one_script(page: Page) -> None:
    loading = ("src", "srcset", "href", "xlink:href", "data", "poster", "action", "background")
    for tag, held in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form"), tag
        for name in loading:
            assert held.get(name, "#").startswith(("data:image/jpeg;base64,", "#")), (tag, name, held[name][:80])
        assert not any(name.startswith("on") for name in held), held
    styles = "".join(text for tag, text in page.texts if tag == "style") + " ".join(
        held.get("style", "") for _, held in page.elements
    )
    assert "url(" not in styles and "@import" not in styles and "{%" not in styles
    (script,) = (text for tag, text in page.texts if tag == "script" and not text.startswith("{"))
    (policy,) = (held["content"] for held in page.all("meta") if "http-equiv" in held)
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert "default-src 'none'" in policy and "http" not in script


def test_every_picture_is_inside_and_told(page: Page) -> None:
    images = page.all("img")
    for held in images:
        with Image.open(io.BytesIO(base64.b64decode(held["src"].partition(",")[2]))) as image:
            image.load()
        assert held["alt"] or "sprite" in held["class"]
    assert all(held.get("aria-label") or held.get("aria-hidden") for held in page.all("svg"))
    assert len(page.source) < 2e6


def test_there_is_one_point_and_one_thumbnail_a_tile(page: Page, job: Job, features: dict[str, Any]) -> None:
    data = page.data
    assert len(page.all("circle", "tile")) == len(data["labels"]) == len(features) == 27
    assert sum(int(held["data-tiles"]) for held in page.all("img", "sprite")) == 27
    assert {key: data["classes"][label] for key, label in zip(data["keys"], data["labels"], strict=True)} == {
        key: name for key, (_, name) in features.items()
    }
    for held, label, group in zip(page.all("circle", "tile"), data["labels"], data["clusters"], strict=True):
        assert {f"k{label}", f"g{group}"} <= set(held["class"].split())
        assert 0 <= float(held["cx"]) <= 600 and 0 <= float(held["cy"]) <= 600
    assert "perplexity 8.67, seed 0" in page.text and "means little" in page.text
    assert "27 of the 27 tiles" in page.text and "these are not the shards that the encoder was trained on" in page.text


def test_neighbours_are_a_slow_loops(page: Page, features: dict[str, tuple[np.ndarray, str]]) -> None:
    tiles = [held["alt"] for held in page.all("img") if "cosine" in held["alt"] or held["alt"].startswith("query")]
    rows = [tiles[start : start + 9] for start in range(0, len(tiles), 9)]
    assert Counter(row[0].split(", ")[1] for row in rows) == dict.fromkeys(page.data["classes"], 3)
    same = 0
    for row in rows:
        query = row[0].split(", ")[-1]
        vector, name = features[query]
        told = {key: math.fsum(vector * other) for key, (other, _) in features.items() if key != query}
        wanted = sorted(told, key=lambda key: -told[key])[:8]
        assert [alt.split(", ")[-1] for alt in row[1:]] == wanted
        for alt, key in zip(row[1:], wanted, strict=True):
            assert f"cosine {told[key]:.3f}" in alt and alt.startswith(features[key][1])
            assert ("another class" in alt) == (features[key][1] != name)
            same += features[key][1] == name
    # three queries of every class are all tiles here
    assert f"{100 * same / (27 * 8):.1f} % are of the tile's own class" in page.text
    assert len(page.all("figure", "wrong")) == 27 * 8 - same


def test_purity_and_mutual_information_are_a_slow_loops(page: Page) -> None:
    data = page.data
    pairs = list(zip(data["clusters"], data["labels"], strict=True))
    right = 0
    for number in range(4):
        held = Counter(label for group, label in pairs if group == number)
        most, total = max(held.values()), sum(held.values())
        assert f"Cluster {number} {total} tiles, purity {most / total:.3f}, mostly" in page.text
        right += most

    def entropy(values: list[Any]) -> float:
        return -sum(n / 27 * math.log(n / 27) for n in Counter(values).values())

    groups, labels = ([pair[side] for pair in pairs] for side in (0, 1))
    nmi = 2 * (entropy(groups) + entropy(labels) - entropy(pairs)) / (entropy(groups) + entropy(labels))
    assert f"Purity {right / 27:.3f} over all clusters" in page.text
    assert f"mutual information with the classes {nmi:.3f}" in page.text


def test_clusters_of_colour_alone_stand_beside(page: Page, job: Job) -> None:
    index, rows = ShardIndex(job.test), []
    for tile, (label,), _ in iterate_tiles(index, ShardReader(job.test), batch_size=1):
        counts = [np.histogram(tile[0, ..., channel], 32, (0, 256))[0] for channel in range(3)]
        rows.append((np.concatenate(counts) / SIZE**2, int(label)))
    colours_ND = np.stack([counts for counts, _ in rows]).astype(np.float32).astype(np.float64)
    colours_ND -= colours_ND.mean(axis=0)
    colours_ND /= np.linalg.norm(colours_ND, axis=1, keepdims=True)
    found = cluster(colours_ND, np.array([label for _, label in rows]), 4, seed=0)
    assert f"colour histograms have {found.purity:.3f} and {found.nmi:.3f}." in page.text


def test_downstream_results_stand_with_their_floors_and_confusion(page: Page, job: Job) -> None:
    content = json.loads((job.folder.parent / "probe.json").read_text())
    for row in content["results"]:
        told = f"{row['features']} {row['classifier']} 100 % {row['labelled']} {row['mean']['accuracy']:.3f}"
        assert told in page.text
    assert page.text.count(content["verdict"]["sentence"]) == 2
    assert "Top-1 accuracy at chance, always naming the most frequent class: 0.111." in page.text
    assert len(page.all("table", "confusion")) == len(page.all("figure", "reliability")) == 3
    assert len(page.all("tr", "own")) == 3 + 3, "scores, and calibration"
    assert all(words in page.text for words in ("Calibration: ECE over 15 bins", "Recall by class with 95 %: encoder"))
    linear, *_ = content["results"]
    recall = linear["recalls"][0]
    assert f"{recall['recall']:.3f} [{recall['interval'][0]:.3f}" in page.text
    assert page.text.count("36 labelled tiles, counts summed over 2 seeds:") == 3
    counts = np.sum([seed["confusion"] for seed in linear["seeds"]], axis=0)
    titles = [held["title"] for held in page.all("td") if " of " in held.get("title", "")]
    assert titles[:81] == [f"{count} of {row.sum()}" for row in counts for count in row]


def test_test_tiles_that_the_encoder_was_trained_on_are_called_a_leak(job: Job, tmp_path: Path) -> None:
    made = report(job, tmp_path / "a.html", "--test", str(job.train), "--tiles", "6")
    assert "LEAK: the encoder was trained on these very shards" in made.text
    own = report(job, tmp_path / "b.html", "--shards", str(job.train), "--tiles", "6")
    assert "LEAK" not in own.text and "The encoder was trained on tiles of these shards" in own.text


def test_every_test_sets_leak_and_a_runs_own_notes_are_told_once(job: Job, tmp_path: Path) -> None:
    content = json.loads((job.folder.parent / "probe.json").read_text())
    held = {name: content[name] for name in ("results", "leak")}
    leak = {"same_manifest": False, "equal_test_tiles": 3}
    several = {"tests": {"first": held, "second": {**held, "leak": leak}}}
    notes = ["MADE-UP TISSUE: drawn", "LEAK: 3 of 27 test tiles", "the same as theirs: nothing", ORIGINAL_STATEMENT]
    reproduced = {"leak": leak, "notes": notes, "config": {"protocol": "original"}}
    tracker = write_run(tmp_path / "run", job.root, job.train, encoder=False)
    tracker.finish("FINISHED")
    (tmp_path / "result").mkdir()
    for kind, changed in (("probe", several), ("reproduce-nct-original", reproduced)):
        file = tmp_path / "result" / f"{kind}.json"
        file.write_text(json.dumps({**content, "tests": None, **changed}))
        log_evaluation(
            source_run_id=tracker.run_id, name=kind, params={}, metrics={}, artifacts=[file],
            tags={"ca2cl.kind": kind}, root=job.root,
        )  # fmt: skip
    material = read_material(tracker.run_id, TrackingConfig(root=job.root))
    found = {result.title.split(",")[0]: result for result in results(material)}
    warning = "LEAK: 3 test tiles of second are training tiles too; these scores say little about new tiles."
    resampled = f"{content['resampled']['statement']}."
    assert "tiles were resampled; no slides known" in resampled
    assert found["probe"].warnings == [warning] and found["probe"].notes[3:] == [resampled]
    assert [one.title.split(", ")[4] for one in found["probe"].confusions] == 3 * ["on first"] + 3 * ["on second"]
    told = found["reproduce-nct-original"]
    assert told.warnings == [notes[0], notes[1], notes[3]] and told.notes[2:] == [resampled, notes[2]]
    made = report(job, tmp_path / "a.html", run=tracker.run_id)
    assert all(made.text.count(text) == 1 for text in (warning, *notes))
    assert len(made.all("p", "warning")) == 1 + 3 + 1  # and the tiles that did not decode


def test_curves_and_lineage_are_the_runs(page: Page, job: Job) -> None:
    told = [held["aria-label"] for held in page.all("svg") if "over optimizer steps" in held.get("aria-label", "")]
    assert [line.split(" over")[0].split(" in ")[0] for line in told] == [
        "Loss", "NT-Xent", "Cluster loss", "Learning rate", "Gradient norm", "Throughput", "Waiting for data",
    ]  # fmt: skip
    assert "NT-Xent running mean ends at 1.965; chance is 3.43" in told[1]
    assert "4 undecodable tiles replaced" in page.text
    words = ShardIndex(job.train).manifest.digest, job.run_id, "FINISHED", torch.__version__, f"models:/{NAME}/"
    assert [word for word in words if word not in page.text] == []
    assert not (page.missing() or page.all("figure", "slide-map") or "#slides" in page.source)  # tiles without places


def test_the_page_is_kept_with_its_run(page: Page, job: Job) -> None:
    client = open_store(None, job.root).client
    assert [file.path for file in client.list_artifacts(job.run_id, "report")] == ["report/crc.html"]


def test_a_page_is_a_function_of_its_seed_and_of_no_directory(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = report(job, tmp_path / "a.html", "--tiles", "20", run=str(job.folder))
    monkeypatch.chdir(tmp_path)
    assert report(job, tmp_path / "b.html", "--tiles", "20", run=str(job.folder)).source == first.source
    other = report(job, tmp_path / "c.html", "--tiles", "20", "--seed", "1", run=str(job.folder))
    assert other.source != first.source and set(other.data["keys"]) != set(first.data["keys"])
    assert len(first.data["keys"]) == 20 and len(set(first.data["labels"])) == 9
    assert "trained on tiles of these shards" in first.text


def test_a_run_is_read_from_the_store_alone_when_its_folder_is_gone(job: Job, tmp_path: Path, page: Page) -> None:
    tracking = TrackingConfig(root=job.root)
    assert read_material(job.run_id, tracking).folder == job.folder  # so the page was made with it
    away = job.folder.with_name("away")
    job.folder.rename(away)
    try:
        assert read_material(job.run_id, tracking).folder is None
        again = report(job, tmp_path / "a.html", "--test", str(job.test), "--clusters", "4")
    finally:
        away.rename(job.folder)
    assert again.source == page.source and "4 steps, 64 tiles" in again.text


def test_names_cannot_become_markup(job: Job, tmp_path: Path) -> None:
    classes = (HOSTILE, '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}")
    shards = write_shards(
        tmp_path / "shards", [encode(t) for t in random_tiles(12, 48)], classes=classes, tile_size=(48, 48)
    )
    tracker = write_run(tmp_path / "run", job.root, shards, name=HOSTILE)
    tracker.finish("FINISHED")
    made = report(job, tmp_path / "a.html", run=str(tmp_path / "run"))
    assert len(made.all("script")) == 2 and HOSTILE not in made.source
    assert not [held for held in made.all("img") if held["src"] == "x"]
    assert made.text.count(HOSTILE) > 3 and "{{ 7 * 7 }}" in made.text and "49" not in made.data["classes"]
    assert made.data["classes"] == list(classes)


@pytest.mark.parametrize("status", ["RUNNING", "FAILED"])
def test_a_run_that_did_not_finish_has_a_page_that_says_so(status: Any, job: Job, tmp_path: Path) -> None:
    tracker = write_run(tmp_path / "run", job.root, job.train, encoder=False)
    if status == "FAILED":
        tracker.finish(status)
    made = report(job, tmp_path / "a.html", run=str(tmp_path / "run"))
    tracker.finish("KILLED") if status == "RUNNING" else None
    assert status in made.text and ("has not ended" if status == "RUNNING" else "This run failed") in made.text
    assert any("no encoder" in line for line in made.missing())
    assert any(f"ca2cl probe --encoder {tracker.run_id}" in line for line in made.missing())
    assert len(made.all("figure", "panel")) == 7 and not made.all("circle", "tile")


def test_missing_parts_are_named_with_what_makes_them(
    job: Job, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shards = shutil.copytree(job.train, tmp_path / "shards")
    tracker = write_run(tmp_path / "run", job.root, shards)
    tracker.finish("FINISHED")
    for tar in shards.glob("*.tar"):
        tar.unlink()
    for gone in (False, True):
        if gone:
            shutil.rmtree(shards)
        made = report(job, tmp_path / "a.html", run=str(tmp_path / "run"))
        assert any("own shards cannot be read" in line for line in made.missing())
        assert "--test SHARDS" in made.text and not made.all("circle", "tile")
        assert "missing: the run's own shards" in capfd.readouterr().out
    again = report(job, tmp_path / "a.html", "--test", str(job.test), run=str(tmp_path / "run"))
    assert len(again.all("circle", "tile")) == 27 and "cannot be read" not in again.text


@pytest.mark.parametrize("count", [1, 5])
def test_few_tiles_without_labels_have_a_page(count: int, job: Job, tmp_path: Path) -> None:
    tiles = [encode(tile) for tile in random_tiles(count, 48)]
    shards = write_shards(tmp_path / "shards", tiles, [-1] * count, tile_size=(48, 48))
    made = report(job, tmp_path / "a.html", "--test", str(shards))
    assert len(made.all("circle", "tile")) == count and "unlabelled" in made.text
    assert any("has no labels" in line for line in made.missing())
    assert "purity" not in made.text.replace("purity and NMI are not known", "") and not made.all("input")


def test_a_store_that_is_away_costs_no_page(job: Job, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(job.folder, tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    record |= {"tracking_uri": f"sqlite:///{tmp_path}/gone.db", "beside": ""}
    (folder / "run.json").write_text(json.dumps(record))
    out = tmp_path / "a.html"
    assert main(["report", str(folder), str(out), "--workers", "0"]) == 2
    assert "written, but not logged" in capfd.readouterr().err
    assert "FINISHED" in (made := Page(out)).text and len(made.all("circle", "tile")) == 36
    assert any("downstream results are in the store" in line for line in made.missing())
    assert not (tmp_path / "gone.db").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{id}", "{tmp}"), "give a file that ends in .html"), (("{id}", "{tmp}/folder.html"), "cannot be written"),
        (("{id}", "{tmp}/file/x.html"), "cannot be written"), (("0" * 32, OUT), "check the id"),
        (("nowhere", OUT), "no alias 'nowhere'"), (("random", OUT), "no alias 'random'"),
        (("{tmp}", OUT), "no run here"), (("{id}",), "OUT"),
        (("{probe}", OUT), "is a probe of an encoder; give the run that made it"),
        (("{id}", OUT, "--test", "{tmp}"), "no manifest here"),
        (("{id}", OUT, "--shards", "{tmp}/none"), "no manifest here"),
        (("{id}", OUT, "--tiles", "0"), "tiles is 0: use 1 or more, up to 10000"),
        (("{id}", OUT, "--clusters", "1"), "clusters is 1"), (("{id}", OUT, "--workers", "-1"), "workers is -1"),
        (("{id}", OUT, "--seed", "-1"), "seed is -1"), (("{id}", OUT, "--device", "cuda:99"), "device is 'cuda:99'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: tuple[str, ...], message: str, job: Job, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").touch()
    store = open_store(None, job.root)
    (probed,) = store.client.search_runs([store.experiment_id("ca2cl")], f"tags.`ca2cl.source_run_id` = '{job.run_id}'")
    filled = [word.format(id=job.run_id, tmp=tmp_path, probe=probed.info.run_id) for word in arguments]
    capfd.readouterr()
    assert main(["report", *filled, "--tracking.root", job.root]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("ca2cl: error: ") and message in line, line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.html"]
