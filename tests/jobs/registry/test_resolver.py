"""The resolver: every way to name an encoder gives the same weights, and a wrong one never half-loads."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ca2cl.errors import InputError
from ca2cl.models.backbone import build_encoder
from ca2cl.models.encoder_io import WEIGHTS_NAME, EncoderCard, save_encoder
from ca2cl.registry.register import log_and_register
from ca2cl.registry.resolve import resolve_encoder
from ca2cl.registry.versions import find_version
from ca2cl.store.names import full_run_id
from ca2cl.store.open import Store, open_store
from tests.support.pickles import Bait

CARD = EncoderCard(arch="resnet18", feature_dim=512, input_size=64, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))


def weights(seed: int, arch: str = "resnet18") -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return build_encoder(arch).state_dict()


def same(encoder: torch.nn.Module, state: dict[str, torch.Tensor]) -> bool:
    found = encoder.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store("", tmp_path_factory.getbasetemp() / "tracking-tests")  # shared: making one takes seconds


@pytest.fixture(scope="module")
def registered(store: Store, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, torch.Tensor]]:
    state = weights(3)
    folder = save_encoder(tmp_path_factory.mktemp("encoder"), state, CARD)
    run_id = ""
    while not run_id.startswith("1"):  # as the version's number does, which once was taken for the run
        run_id = str(store.client.create_run(store.experiment_id("tests")).info.run_id)
    log_and_register(run_id, folder, "ca2cl-encoder", store)
    return run_id, state


@pytest.mark.parametrize(
    "form",
    [
        "{run}",
        "runs:/{run}",
        "runs:/{run}/encoder",
        "models:/ca2cl-encoder/1",
        "models:/ca2cl-encoder@latest",
        "models:/ca2cl-encoder/latest",
        "models:/ca2cl-encoder@champion",
        "{short}",  # as the tables show it
        "runs:/{short}",
        "1",
        "champion",
        "latest",
    ],
)
def test_a_stored_encoder_is_found_by_every_name(
    store: Store, registered: tuple[str, dict[str, torch.Tensor]], form: str
) -> None:
    run_id, state = registered
    named = form.format(run=run_id, short=run_id[:8])
    found = resolve_encoder(named, tracking_uri=store.uri)
    assert same(found.encoder, state) and not found.encoder.training
    assert found.card == CARD and found.source_run_id == run_id
    assert found.uri == (f"runs:/{run_id}" if run_id[:8] in named else "models:/ca2cl-encoder/1")


def test_a_stored_encoder_is_found_by_the_root_of_the_embedded_store(
    store: Store, registered: tuple[str, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert store.root is not None
    assert same(resolve_encoder(registered[0], root=store.root).encoder, registered[1])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("0" * 32, "not in sqlite"),
        ("runs:/" + "0" * 32, "not in sqlite"),
        ("models:/nothing/1", "registered model 'nothing': not in sqlite"),
        ("models:/ca2cl-encoder/9", "has no version 9: there are "),
        ("models:/ca2cl-encoder@none", "has no alias 'none'"),
        ("models:/ca2cl-encoder/x", "has no alias 'x'"),
        ("models:/a/b/c", "models:/NAME/VERSION"),
        ("torchvision:NONE", "IMAGENET1K_V1"),
        ("random:x", "random:SEED"),
        ("/nowhere/at/all", "not there"),
        ("nowhere", "no file or folder of that name; ca2cl-encoder has no alias 'nowhere'"),
        ("9", "ca2cl-encoder has no version 9: there are 1"),
        ("fffffff0", "no file or folder of that name"),
    ],
)
def test_an_unknown_source_is_one_clear_line(
    store: Store, registered: tuple[str, dict[str, torch.Tensor]], source: str, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        resolve_encoder(source, tracking_uri=store.uri)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["models:/ca2cl-encoder@champion", "runs:/" + "0" * 32, "champion", "0123abcd"])
def test_looking_for_an_encoder_makes_no_store(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match=f"no store in {tmp_path}/ca2cl-runs; give a run's folder.*root=FOLDER"):
        resolve_encoder(source)
    assert not any(tmp_path.iterdir())


def test_an_empty_store_names_the_way_to_another(tmp_path: Path) -> None:
    open_store(None, tmp_path)
    with pytest.raises(InputError, match="'ca2cl-encoder': not in sqlite.*; give a run's folder"):
        resolve_encoder("models:/ca2cl-encoder@champion", root=tmp_path)


def test_digits_of_several_runs_are_refused_and_more_of_them_tell(store: Store, tmp_path: Path) -> None:
    experiment, ids = store.experiment_id("tests"), ["aaaaaa" + digit * 26 for digit in "bc"]
    made_ids = [str(store.client.create_run(experiment).info.run_id) for _ in ids]
    assert store.root is not None
    with sqlite3.connect(str(store.root / "mlflow.db")) as database:  # MLflow draws its ids by itself
        for run_id, made in zip(ids, made_ids, strict=True):
            database.execute("UPDATE runs SET run_uuid = ? WHERE run_uuid = ?", (run_id, made))
            database.execute("UPDATE tags SET run_uuid = ? WHERE run_uuid = ?", (run_id, made))
    with pytest.raises(InputError, match=f"'aaaaaa': fits several runs .{ids[0]}, {ids[1]}"):
        resolve_encoder("aaaaaa", tracking_uri=store.uri)
    assert full_run_id(store, "aaaaaac") == ids[1] and full_run_id(store, "runs:/aaaaaab") == ids[0]


def test_an_alias_of_the_only_other_model_is_found_and_one_of_several_is_refused(
    store: Store, registered: tuple[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    for seed, name in ((11, "one-more"), (12, "another")):
        folder = save_encoder(tmp_path / name, weights(seed), CARD)
        version = log_and_register(
            str(store.client.create_run(store.experiment_id("tests")).info.run_id), folder, name, store
        )
        store.client.set_registered_model_alias(name, "best" if name == "another" else "good", version)
    assert find_version(store, "good").uri == "models:/one-more/1"
    assert find_version(store, "champion").name == "ca2cl-encoder"  # as every model has one
    store.client.set_registered_model_alias("one-more", "best", "1")
    with pytest.raises(InputError, match="'best': fits several .models:/another/1, models:/one-more/1"):
        find_version(store, "best")


def test_a_local_folder_wins_over_a_version_of_that_name(
    store: Store, registered: tuple[str, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("1", "champion", registered[0][:8]):
        state = weights(21)
        save_encoder(tmp_path / name, state, CARD)
        assert same(resolve_encoder(name, tracking_uri=store.uri).encoder, state)


def test_a_run_without_an_encoder_is_one_clear_line(store: Store) -> None:
    run_id = str(store.client.create_run(store.experiment_id("tests")).info.run_id)
    with pytest.raises(InputError, match="has no encoder yet"):
        resolve_encoder(run_id, tracking_uri=store.uri)


def test_another_architecture_is_refused(store: Store, registered: tuple[str, dict[str, torch.Tensor]]) -> None:
    with pytest.raises(InputError, match="is a resnet18, not a resnet50"):
        resolve_encoder(registered[0], tracking_uri=store.uri, arch="resnet50")
    assert resolve_encoder(registered[0], tracking_uri=store.uri, arch="resnet18").encoder.arch == "resnet18"


def test_folders_and_files(tmp_path: Path) -> None:
    state = weights(5)
    folder = save_encoder(tmp_path / "run" / "encoder", state, CARD)
    for source in (tmp_path / "run", folder, folder / WEIGHTS_NAME):
        found = resolve_encoder(str(source))
        assert same(found.encoder, state) and found.card == CARD
    with pytest.raises(InputError, match="not a resnet34"):
        resolve_encoder(str(folder / WEIGHTS_NAME), arch="resnet34")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no encoder.safetensors"):
        resolve_encoder(str(tmp_path / "empty"))


def test_a_bare_safetensors_file_takes_the_given_architecture(tmp_path: Path) -> None:
    state = weights(5, "resnet34")
    save_file(state, tmp_path / "any.safetensors")
    found = resolve_encoder(str(tmp_path / "any.safetensors"), arch="resnet34")
    assert same(found.encoder, state) and found.card.arch == "resnet34" and found.card.feature_dim == 512
    with pytest.raises(InputError, match="unexpected"):
        resolve_encoder(str(tmp_path / "any.safetensors"))


@pytest.mark.parametrize("name", ["last.pth", "last.tar"])
@pytest.mark.parametrize("prefix", ["module.resnet.", "resnet."])
def test_the_authors_checkpoint_loads_without_its_heads(tmp_path: Path, name: str, prefix: str) -> None:
    state = weights(6)
    net = {f"{prefix}{key}": tensor for key, tensor in state.items()}
    net |= {f"{prefix}fc.0.weight": torch.zeros(2, 2), "module.group.weight": torch.zeros(2)}
    torch.save({"net": net, "epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / name)
    assert same(resolve_encoder(str(tmp_path / name)).encoder, state)


def test_a_checkpoint_that_lacks_a_tensor_fails_with_the_counts(tmp_path: Path) -> None:
    state = weights(6)
    net = {f"module.resnet.{key}": tensor for key, tensor in state.items() if key != "layer2.0.conv1.weight"}
    torch.save({"net": net}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"119 of 120 .* 1 missing \(first layer2.0.conv1.weight\)"):
        resolve_encoder(str(tmp_path / "a.pth"))


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("evil"),))  # type: ignore[return-value]


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, None])
def test_a_foreign_file_is_never_executed(
    tmp_path: Path, content: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pth"
    torch.save({"net": _Evil()}, path) if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match="not a file of plain tensors") as caught:
        resolve_encoder(str(path))
    assert not (tmp_path / "evil").exists() and "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["pickle", "torch_zip", "torch_old", "numpy", "joblib", "a model"])
@pytest.mark.filterwarnings("error")
def test_the_refusal_of_a_pickle_does_not_say_how_to_run_it(tmp_path: Path, form: str) -> None:
    bait, path = Bait(tmp_path), tmp_path / "model.pth"
    if form == "a model":
        torch.save({"net": torch.nn.ReLU()}, path)
    else:
        path.write_bytes(bait.forms[form])
    with pytest.raises(InputError) as caught:
        resolve_encoder(str(path))
    message = str(caught.value)
    assert "torch.save(model.state_dict(), FILE)" in message and not bait.sprung
    assert ("torch.nn.modules.activation.ReLU" in message) == (form == "a model")
    for leaked in ("weights_only", "safe_globals", "trust", "[1m", "issue"):
        assert leaked not in message, message


def test_random_is_a_function_of_its_seed_and_leaves_the_callers_numbers_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first, again, other = (resolve_encoder(source) for source in ("random", "random:0", "random:1"))
    assert torch.equal(torch.rand(3), expected)
    assert same(first.encoder, again.encoder.state_dict())
    assert not same(first.encoder, other.encoder.state_dict())
    assert resolve_encoder("random", arch="resnet50").card.feature_dim == 2048


def test_torchvision_weights_come_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the published file's name and place; a cached file is taken as it is, so its content may be another."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    path = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    torch.save({**weights(8), "fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}, path)
    found = resolve_encoder("torchvision:IMAGENET1K_V1")
    assert same(found.encoder, weights(8))


def test_a_download_that_fails_is_one_error_and_nothing_on_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(InputError, match=r"cannot be downloaded or read .*resnet18-f37072fd.pth"):
        resolve_encoder("torchvision:IMAGENET1K_V1")
    shown = capsys.readouterr()
    assert shown.out == "" and "Downloading" in shown.err


def test_bare_weights_are_compared_at_the_first_encoders_size(tmp_path: Path) -> None:
    """And an encoder with a card at its own."""
    random = resolve_encoder("random:1")
    card = replace(random.card, input_size=96)
    save_encoder(tmp_path / "trained", random.encoder.state_dict(), card)
    trained = resolve_encoder(str(tmp_path / "trained"))
    assert random.bare and not trained.bare
    assert random.card.input_size == 224 and random.beside(trained).card == card
    assert trained.beside(random) is trained
