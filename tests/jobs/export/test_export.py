"""Exported files: each target's own loader gives the encoder's features, and a file that would not is never left."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from ca2cl.cli import main
from ca2cl.common.optional import MissingPackage, need
from ca2cl.detection.engines.detectron2_weights import detectron2_name
from ca2cl.errors import InputError
from ca2cl.export.run import TARGETS, export
from ca2cl.export.target import plain_state
from ca2cl.export.to_torchvision import TORCHVISION, Torchvision
from ca2cl.export.verify import sample_tiles
from ca2cl.models.backbone import Backbone, build_encoder
from ca2cl.models.batch_norm import commit_statistics, recording
from ca2cl.models.encoder_io import CARD_NAME, WEIGHTS_NAME, EncoderCard, load_encoder, save_encoder
from ca2cl.models.preprocess import normalise_
from ca2cl.registry.resolve import ResolvedEncoder, resolve_encoder

SIDE = 64
CARD = EncoderCard(
    arch="resnet18",
    feature_dim=512,
    input_size=SIDE,
    mean=(0.7, 0.5, 0.68),
    std=(0.2, 0.25, 0.18),
    classes=("A", "B"),
    step=7,
    metrics={"loss": 1.5},
    source_run_id="0123456789abcdef" * 2,
)
SUFFIX = {"torchvision": ".pth", "timm": ".safetensors", "detectron2": ".pth", "onnx": ".onnx", "safetensors": ""}
COUNTER = "num_batches_tracked"


def trained(arch: str) -> Backbone:
    """An encoder whose BatchNorms have seen tiles and are not the identity, so that whatever is left out shows."""
    torch.manual_seed(3)
    encoder = build_encoder(arch).train()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if parameter.ndim == 1:  # BatchNorm's weight and bias
                parameter += (0.2 if name.endswith("weight") else 0.05) * torch.randn_like(parameter)
        for _ in range(3):
            with recording(encoder, 0):
                encoder(1.5 * torch.randn(8, 3, SIDE, SIDE) + 0.3)
            commit_statistics(encoder)
    return encoder.eval()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with an encoder and its card, for each architecture."""
    torch.set_num_threads(1)
    folders = {}
    for arch, dim in (("resnet18", 512), ("resnet50", 2048)):
        card = dataclasses.replace(CARD, arch=arch, feature_dim=dim)
        folders[arch] = save_encoder(tmp_path_factory.mktemp(arch), trained(arch).state_dict(), card)
    return folders


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)  # weights of 100 MB a test


Outcome = tuple[int, str, str]
Verb = Callable[..., Outcome]


@pytest.fixture
def ca2cl(capfd: pytest.CaptureFixture[str]) -> Verb:
    def call(*arguments: object) -> Outcome:
        code = main(["export", *map(str, arguments)])
        return code, *capfd.readouterr()

    return call


def in_target(told: str) -> Any:
    """``model`` as the three lines at the end of the report make it."""
    scope: dict[str, Any] = {}
    exec("\n".join(told.splitlines()[-3:]), scope)
    return scope["model"]


def expected(source: Path) -> Tensor:
    encoder, card = load_encoder(source)
    with torch.inference_mode():
        features: Tensor = encoder(normalise_(sample_tiles(SIDE), card.mean, card.std))
    return features


def far(found: Any, wanted: Tensor) -> float:
    found = torch.as_tensor(found)
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max())


def installed(name: str) -> bool:
    try:
        need(name, "")
    except MissingPackage:
        return False
    return True


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("target", TARGETS)
def test_the_printed_lines_load_the_encoder_in_the_target(
    sources: dict[str, Path], folder: Path, ca2cl: Verb, arch: str, target: str
) -> None:
    out = folder / f"it{SUFFIX[target]}"
    code, told, errors = ca2cl("--encoder", sources[arch], "--to", target, out)
    assert code == 0, errors
    weights = out / WEIGHTS_NAME if target == "safetensors" else out
    content = weights.read_bytes()
    facts = (
        f"target    {target}",
        f"encoder   {arch} from {sources[arch]}, step 7",
        f"run       {CARD.source_run_id}",
        f"features  {2048 if arch == 'resnet50' else 512}",
        f"input     {SIDE} x {SIDE} px",
        "mean      0.7 0.5 0.68",
        "std       0.2 0.25 0.18",
        f"file      {weights}, {len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()}",
    )
    assert all(fact in told for fact in facts), told
    if target == "detectron2" and not installed("detectron2"):
        assert "not by detectron2: detectron2 is not installed; it has no wheels, build it" in told
        assert "By ca2cl's own reading: features differ by " in told
        return
    assert f"verified  by {TARGETS[target].package}" in told
    model, tiles = in_target(told), sample_tiles(SIDE)
    with torch.inference_mode():
        found = model(tiles.numpy() if target == "onnx" else normalise_(tiles, CARD.mean, CARD.std))
    if target == "detectron2":
        found = found["res5"].mean((2, 3))
    assert far(found, expected(sources[arch])) <= (1e-4 if target == "onnx" else 1e-5)
    assert sorted(path.name for path in folder.iterdir()) == ["it.pth", "it.yaml"] if target == "detectron2" else [out]


def test_the_tiles_of_the_trial_tell_encoders_apart(sources: dict[str, Path]) -> None:
    features = expected(sources["resnet18"])
    assert far(features[0], features[1]) > 0.05 and far(features[1], features[2]) > 0.05
    encoder, card = load_encoder(sources["resnet18"])
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
    with torch.inference_mode():
        assert far(encoder(normalise_(sample_tiles(SIDE), card.mean, card.std)), features) > 0.05


def test_torchvision_misses_only_its_classifier(sources: dict[str, Path], folder: Path, ca2cl: Verb) -> None:
    import torchvision

    out = folder / "new" / "it.pt"
    assert ca2cl(out, "--encoder", sources["resnet18"], "--to", "torchvision")[0] == 0
    state = torch.load(out, weights_only=True)
    assert type(state) is dict and all(type(value) is Tensor for value in state.values())
    model = torchvision.models.resnet18()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["fc.weight", "fc.bias"] and unexpected == []
    assert resolve_encoder(str(out)).card.arch == "resnet18"


def test_the_same_encoder_gives_the_same_bytes(sources: dict[str, Path]) -> None:
    encoder, card = load_encoder(sources["resnet18"])
    for name, target in TARGETS.items():
        first, second = (target.build(encoder, card, Path(f"/it{SUFFIX[name]}")) for _ in range(2))
        assert first == second, name


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_timm_also_finds_the_encoders_normalisation(
    sources: dict[str, Path], folder: Path, ca2cl: Verb, suffix: str
) -> None:
    import timm

    code, told, _ = ca2cl("--encoder", sources["resnet18"], "--to", "timm", folder / f"it{suffix}")
    assert code == 0
    data = timm.data.resolve_model_data_config(in_target(told))
    assert data["mean"] == CARD.mean and data["std"] == CARD.std and data["input_size"] == (3, SIDE, SIDE)


def test_safetensors_is_what_the_registry_has(sources: dict[str, Path], folder: Path, ca2cl: Verb) -> None:
    out = folder / "it"
    assert ca2cl("--encoder", sources["resnet18"], "--to", "safetensors", out)[0] == 0
    for name in (WEIGHTS_NAME, CARD_NAME):
        assert (out / name).read_bytes() == (sources["resnet18"] / name).read_bytes()
    assert resolve_encoder(str(out)).card == CARD


def test_a_run_that_only_the_registry_knows_is_written_down(folder: Path) -> None:
    card = dataclasses.replace(CARD, source_run_id=None)
    found = ResolvedEncoder(trained("resnet18"), card, "f" * 32, "models:/some/3")
    told = export(found, TARGETS["safetensors"], folder / "it")
    assert "resnet18 from models:/some/3" in told and f"run       {'f' * 32}" in told
    assert load_encoder(folder / "it")[1].source_run_id == "f" * 32


def test_onnx_takes_any_number_of_tiles_of_its_size_and_carries_the_card(
    sources: dict[str, Path], folder: Path, ca2cl: Verb
) -> None:
    import onnx
    import onnxruntime

    out = folder / "it.onnx"
    code, told, _ = ca2cl("--encoder", sources["resnet18"], "--to", "onnx", out)
    assert code == 0
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    notes = session.get_modelmeta().custom_metadata_map
    raw = json.loads(notes["card"])
    assert EncoderCard(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}) == CARD
    assert "RGB in [0, 1]" in notes["input"] and "512" in notes["output"]
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape, given.type) == ("tiles", ["batch", 3, SIDE, SIDE], "tensor(float)")
    assert (made.name, made.shape) == ("features", ["batch", 512])
    tiles, wanted = sample_tiles(SIDE), expected(sources["resnet18"])
    for count in (1, 2, 7):
        rows = torch.arange(count) % 3
        assert far(in_target(told)(tiles[rows].numpy()), wanted[rows]) <= 1e-4
    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
        session.run(None, {"tiles": torch.zeros(1, 3, 32, 32).numpy()})
    graph = onnx.load(out)
    assert {entry.version for entry in graph.opset_import if entry.domain == ""} == {17}
    assert {node.domain for node in graph.graph.node} == {""}


def detectron2_keys(depth: int) -> list[str]:
    """Keys of detectron2's backbone, written down from its source: BasicStem, BasicBlock, BottleneckBlock, get_norm."""
    blocks = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}[depth]
    convolutions = ["conv1", "conv2"] if depth == 18 else ["conv1", "conv2", "conv3"]
    modules = ["stem.conv1"]
    for stage, count in zip(("res2", "res3", "res4", "res5"), blocks, strict=True):
        for block in range(count):
            # where in_channels != out_channels: not in the first stage of a basic network, 64 to 64
            if block == 0 and not (depth == 18 and stage == "res2"):
                modules.append(f"{stage}.{block}.shortcut")
            modules += [f"{stage}.{block}.{name}" for name in convolutions]
    norm = ("weight", "bias", "running_mean", "running_var")
    return [key for m in modules for key in (f"{m}.weight", *(f"{m}.norm.{name}" for name in norm))]


@pytest.mark.parametrize(("arch", "depth"), [("resnet18", 18), ("resnet50", 50)])
def test_detectron2_gets_every_tensor_under_its_own_names(sources: dict[str, Path], arch: str, depth: int) -> None:
    encoder, card = load_encoder(sources[arch])
    out = Path("/there/it.pth")
    files = TARGETS["detectron2"].build(encoder, card, out)
    assert list(files) == ["it.yaml", "it.pth"]
    written = torch.load(io.BytesIO(files["it.pth"]), weights_only=True)
    assert written["matching_heuristics"] is True and written["__author__"] == "ca2cl"
    keys = detectron2_keys(depth)
    assert len(keys) == len(set(keys)) and set(written["model"]) == set(keys)
    state = plain_state(encoder)
    ours = [name for name in state if not name.endswith(COUNTER)]
    assert len(ours) == len(keys)
    for name in ours:
        assert torch.equal(written["model"][detectron2_name(name)], state[name]), name
    config = yaml.safe_load(files["it.yaml"])
    assert config["MODEL"]["WEIGHTS"] == str(out) and config["INPUT"] == {"FORMAT": "RGB"}
    assert config["MODEL"]["PIXEL_MEAN"] == [178.5, 127.5, 173.4] and config["MODEL"]["PIXEL_STD"] == [51, 63.75, 45.9]
    resnets = config["MODEL"]["RESNETS"]
    assert resnets["DEPTH"] == depth and resnets["STRIDE_IN_1X1"] is False
    assert resnets.get("RES2_OUT_CHANNELS") == (64 if depth == 18 else None)


def test_names_in_detectron2() -> None:
    pairs = {
        "bn1.running_var": "stem.conv1.norm.running_var",
        "layer4.0.downsample.0.weight": "res5.0.shortcut.weight",
        "layer2.0.downsample.1.running_mean": "res3.0.shortcut.norm.running_mean",
    }
    assert {name: detectron2_name(name) for name in pairs} == pairs


def test_a_file_with_other_features_is_never_put_in_place(sources: dict[str, Path], folder: Path) -> None:
    """The fault: BatchNorm's statistics are left at what a new network has."""

    class Forgetful(Torchvision):
        def build(self, encoder: Backbone, card: EncoderCard, out: Path) -> dict[str, bytes]:
            other = build_encoder(card.arch)
            other.load_state_dict({**other.state_dict(), **dict(encoder.named_parameters())})
            return super().build(other, card, out)

    out = folder / "it.pth"
    out.write_bytes(b"what was there")
    with pytest.raises(InputError, match=r"torchvision: features of the file differ by .* nothing was written"):
        export(resolve_encoder(str(sources["resnet18"])), Forgetful(), out, overwrite=True)
    assert [path.name for path in folder.iterdir()] == ["it.pth"] and out.read_bytes() == b"what was there"


def test_an_encoder_that_diverged_is_refused(folder: Path) -> None:
    encoder = trained("resnet18")
    encoder.conv1.weight.data[0] = torch.nan
    with pytest.raises(InputError, match="not finite; export an encoder that converged"):
        export(ResolvedEncoder(encoder, CARD, None, "x"), TORCHVISION, folder / "it.pth")
    assert not list(folder.iterdir())


def test_overwrite_replaces_a_file_and_a_folder(sources: dict[str, Path], folder: Path, ca2cl: Verb) -> None:
    (folder / "it.pth").write_bytes(b"old")
    (folder / "it").mkdir()
    (folder / "it" / WEIGHTS_NAME).write_bytes(b"old")
    for target in ("torchvision", "safetensors"):
        out = folder / f"it{SUFFIX[target]}"
        code, _, errors = ca2cl("--encoder", sources["resnet18"], "--overwrite", "--to", target, out)
        assert code == 0, errors
        state = resolve_encoder(str(out)).encoder.state_dict()
        assert torch.equal(state["conv1.weight"], load_encoder(sources["resnet18"])[0].state_dict()["conv1.weight"])
    assert {path.name for path in folder.iterdir()} == {"it", "it.pth"}


def test_without_onnxruntime_the_report_says_that_it_was_not_tried(
    sources: dict[str, Path], folder: Path, ca2cl: Verb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # how Python spells "cannot be imported"
    code, told, _ = ca2cl("--encoder", sources["resnet18"], "--to", "onnx", folder / "it.onnx")
    assert code == 0 and (folder / "it.onnx").exists()
    (line,) = re.findall(r"verified  (.*)", told)
    assert line == 'not by onnxruntime: onnxruntime is not installed; pip install "ca2cl[export]"'


def test_without_onnx_nothing_can_be_written(
    sources: dict[str, Path], folder: Path, ca2cl: Verb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    code, _, errors = ca2cl("--encoder", sources["resnet18"], "--to", "onnx", folder / "it.onnx")
    assert code == 2 and not list(folder.iterdir())
    assert errors == 'ca2cl: error: onnx is not installed; pip install "ca2cl[export]"\n'


def test_a_package_that_is_there_but_broken_is_told_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "brittle.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.syspath_prepend(str(folder))
    with pytest.raises(MissingPackage, match="brittle cannot be imported .*nowhere_to_be_found.*; do this"):
        need("brittle", "do this")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--encoder", "nowhere", "--to", "timm", "it.pth"), "encoder 'nowhere': not there"),
        (("--encoder", "random", "--to", "torchvison", "it.pth"), "to is 'torchvison': did you mean torchvision?"),
        (("--encoder", "random", "--to", "ONNX", "it.onnx"), "to is 'ONNX': did you mean onnx?"),
        (("--encoder", "random", "--to", "q", "it.onnx"), "there are torchvision, timm, detectron2, onnx, safetensors"),
        (("--encoder", "random", "--to", "onnx", "it.pth"), "onnx reads .onnx"),
        (("--encoder", "random", "--to", "detectron2", "it.pkl"), "detectron2 reads .pth"),
        (("--encoder", "random", "--to", "timm", "it"), "timm reads .safetensors or .pth or .pt"),
        (("--encoder", "random", "--to", "safetensors", "it.safetensors"), "give a name without .safetensors"),
        (("--encoder", "random", "--to", "torchvision", "there.pth"), "is there already; add --overwrite"),
        (("--encoder", "random", "--to", "torchvision", "folder.pth", "--overwrite"), "a folder is there"),
        (("--encoder", "random", "--to", "safetensors", "there", "--overwrite"), "a file is there"),
        (("--encoder", "random", "--to", "safetensors", "folder.d"), "is there already; add --overwrite"),
        (("--encoder", "random", "--to", "safetensors", "folder.d", "--overwrite"), "holds more than an encoder"),
        (("--encoder", "random", "--to", "detectron2", "beside.pth"), "beside.yaml: is there already"),
        (("--encoder", "random", "--to", "timm", "there/it.pth"), "there is not a folder that can be written"),
        (("--encoder", "random", "--to", "timm", f"{'n' * 300}.pth"), "cannot be written (File name too long)"),
        (("--encoder", "random", "--to", "timm", "--arch", "vit", "it.pth"), "use one of resnet18"),
        (("--encoder", "random", "--to", "timm"), "OUT"),
        (("--encoder", "random", "--to", "timm", "it.pth", "more"), "more"),
        (("--encoder", "random", "it.pth"), "to"),
    ],
)
def test_bad_usage_is_one_line_and_changes_nothing(
    ca2cl: Verb, folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(folder)
    for name in ("there", "there.pth", "beside.yaml"):
        Path(name).write_text("kept")
    for name in ("folder.pth", "folder.d"):
        Path(name).mkdir()
        (Path(name) / "thesis.tex").write_text("kept")
    before = sorted(folder.rglob("*"))
    code, out, errors = ca2cl(*arguments)
    assert code == 2 and out == ""
    (line,) = errors.splitlines()
    assert line.startswith("ca2cl: error: ") and message in line, line
    assert sorted(folder.rglob("*")) == before
    assert all(path.read_text() == "kept" for path in before if path.is_file())
