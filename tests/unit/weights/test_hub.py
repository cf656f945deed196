"""Weights of the hub, from a server on loopback: found, gated, missing, cut short, and without a network."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save

from ca2cl.errors import InputError
from ca2cl.models.backbone import build_encoder
from ca2cl.registry.resolve import resolve_encoder
from tests.support.hub import COMMIT, TOKEN, Hub, Repo
from tests.unit.weights.test_transformers import CONFIGS, SHAPE, published, trained

SIDE = 64
ARCH = "timm:test_vit,init_values=1e-05,reg_tokens=2"
CONFIG: dict[str, Any] = {
    "architecture": "test_vit",
    "num_classes": 0,
    "model_args": {
        "img_size": SIDE, "init_values": 1e-5, "reg_tokens": 2, "num_classes": 0, "dynamic_img_size": True,
        "global_pool": "",
    },
    "pretrained_cfg": {
        "mean": [0.7, 0.6, 0.5], "std": [0.2, 0.25, 0.3], "input_size": [3, SIDE, SIDE], "mpp": 0.5, "license": "mit",
    },
}  # fmt: skip
CARD = """---
license: other
license_name: some-tissue-1.0
license_link: LICENSE.md
extra_gated_prompt: say who you are
---
# A model
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def state_of(arch: str = ARCH) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return build_encoder(arch, image_size=SIDE).state_dict()


def repository(**more: Any) -> Repo:
    files = {
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors": save(state_of()),
        "README.md": CARD.encode(),
        "LICENSE.md": b"# Some Tissue License\n\nNo commercial use.\n",
    }
    return Repo(files, **more)


def pickled(state: dict[str, torch.Tensor]) -> bytes:
    out = io.BytesIO()
    torch.save(state, out)
    return out.getvalue()


def test_a_repository_gives_the_encoder_its_input_and_its_licence(hub: Hub) -> None:
    hub.repos["tissue/vit"] = repo = repository()
    found = resolve_encoder("hf-hub:tissue/vit")
    assert all(torch.equal(one, state_of()[name]) for name, one in found.encoder.state_dict().items())
    card = found.card
    assert (card.arch, card.input_size, card.mean, card.std, card.mpp) == (
        ARCH, SIDE, (0.7, 0.6, 0.5), (0.2, 0.25, 0.3), 0.5,
    )  # fmt: skip
    assert card.licence == "some-tissue-1.0" and card.licence_text == "# Some Tissue License\n\nNo commercial use."
    assert found.uri == card.start == f"hf-hub:tissue/vit@{COMMIT}"
    assert card.start_sha256 == hashlib.sha256(repo.files["model.safetensors"]).hexdigest()
    assert card.start_tensors == len(state_of()) and not found.bare


def test_a_repository_of_transformers_gives_its_input_and_its_licence(hub: Hub) -> None:
    arch = (
        "timm:vit_base_patch14_dinov2,depth=2,embed_dim=32,no_embed_class=true,num_heads=2,patch_size=16,reg_tokens=3"
    )
    own = trained(arch)
    files = repository().files | {
        "config.json": json.dumps({**SHAPE, **CONFIGS["registers"]}).encode(),
        "model.safetensors": save(published(own.state_dict(), eva=False)),
        "preprocessor_config.json": b'{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "size": 64}',
    }
    hub.repos["tissue/phikon"] = Repo(files)
    found = resolve_encoder("hf-hub:tissue/phikon")
    assert (found.card.arch, found.card.input_size, found.card.mean) == (arch, 64, (0.5, 0.5, 0.5))
    assert found.card.licence == "some-tissue-1.0" and not found.bare
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(found.encoder(x), own(x), rtol=1e-5, atol=1e-5)
    del hub.repos["tissue/phikon"].files["preprocessor_config.json"]
    assert resolve_encoder("hf-hub:tissue/phikon").card.input_size == 64


def test_a_revision_and_another_file(hub: Hub) -> None:
    hub.repos["tissue/vit"] = repo = repository(revisions=("v2", COMMIT))
    repo.files["weights/teacher.pth"] = pickled({f"backbone.{name}": one for name, one in state_of().items()})
    found = resolve_encoder("hf-hub:tissue/vit/weights/teacher.pth@v2")
    assert found.card.start == f"hf-hub:tissue/vit/weights/teacher.pth@{COMMIT}"
    assert any("/resolve/v2/weights/teacher.pth" in line for line in hub.asked)
    with pytest.raises(InputError, match="has no revision .main.") as error:
        resolve_encoder("hf-hub:tissue/vit")
    assert "\n" not in str(error.value)


def test_a_pickle_is_read_where_there_are_no_safetensors(hub: Hub) -> None:
    hub.repos["tissue/vit"] = repo = repository()
    del repo.files["model.safetensors"]
    repo.files["pytorch_model.bin"] = pickled(state_of())
    assert resolve_encoder("hf-hub:tissue/vit").card.arch == ARCH


def test_a_gated_repository_says_what_to_do_and_opens_to_a_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["tissue/vit"] = repository(gated=True)
    for token in (None, "hf_of_somebody_else"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(InputError) as error:
            resolve_encoder("hf-hub:tissue/vit")
        told = str(error.value)
        assert f"gated; accept its terms at {hub.url}/tissue/vit, and set HF_TOKEN" in told and "\n" not in told
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert resolve_encoder("hf-hub:tissue/vit").card.licence == "some-tissue-1.0"


def test_a_second_use_needs_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["tissue/vit"] = repo = repository()
    del repo.files["LICENSE.md"]
    repo.files["pytorch_model.bin"] = pickled(state_of())
    del repo.files["model.safetensors"]
    first = resolve_encoder("hf-hub:tissue/vit")
    hub.stop()
    assert resolve_encoder("hf-hub:tissue/vit").card == first.card
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_encoder("hf-hub:tissue/vit").card == first.card
    with pytest.raises(InputError) as error:
        resolve_encoder("hf-hub:tissue/other")
    told = str(error.value)
    assert "not in the cache, and the hub cannot be reached" in told and "\n" not in told


@pytest.mark.parametrize(
    ("source", "change", "words"),
    [
        ("hf-hub:tissue/none", {}, "no such repository"),
        ("hf-hub:tissue", {}, "give hf-hub:ORG/NAME"),
        ("hf-hub:tissue/vit@", {}, "give hf-hub:ORG/NAME"),
        ("hf-hub:tissue/vit/none.pth", {}, "has no none.pth"),
        ("hf-hub:tissue/vit", {"model.safetensors": None}, "has no model.safetensors"),
        ("hf-hub:tissue/vit", {"config.json": b"{"}, "config.json: damaged, not JSON"),
        ("hf-hub:tissue/vit", {"config.json": b'{"architecture": "vit_of_nobody"}'}, "timm has no vit_of_nobody"),
        (
            "hf-hub:tissue/vit",
            {"config.json": b'{"architecture": "test_vit", "model_args": {"block_fn": "x"}}'},
            "builds test_vit with block_fn='x', which model.arch cannot set",
        ),
        ("hf-hub:tissue/vit", {"config.json": b'{"architecture": "test_vit", "mean": [1, 2]}'}, "mean is [1, 2]"),
        ("hf-hub:tissue/vit", {"config.json": b'{"model_type": "clip"}'}, "not a resnet18: 0 of"),
        ("hf-hub:tissue/vit", {"config.json": b'{"model_type": "dinov2"}'}, "hidden_size"),
        ("hf-hub:tissue/vit", {"model.safetensors": b"short"}, "not a whole safetensors file"),
    ],
)
def test_a_fault_is_one_line(hub: Hub, source: str, change: dict[str, bytes | None], words: str) -> None:
    hub.repos["tissue/vit"] = repo = repository()
    for name, data in change.items():
        if data is None:
            del repo.files[name]
        else:
            repo.files[name] = data
    with pytest.raises(InputError) as error:
        resolve_encoder(source)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_transfer_that_breaks_off_goes_on_and_one_cut_short_is_refused(hub: Hub) -> None:
    hub.repos["tissue/vit"] = repo = repository(broken={"model.safetensors"})
    assert resolve_encoder("hf-hub:tissue/vit").card.arch == ARCH
    assert sum(line.startswith("GET") and "model.safetensors" in line for line in hub.asked) == 2
    hub.repos["tissue/cut"] = repository(short={"model.safetensors"})
    with pytest.raises(InputError, match="model.safetensors cannot be downloaded .*try again") as error:
        resolve_encoder("hf-hub:tissue/cut")
    assert "\n" not in str(error.value)
    hub.repos["tissue/cut"].short.clear()  # nothing of it stays in the cache as whole
    assert resolve_encoder("hf-hub:tissue/cut").card.arch == ARCH
    assert repo.broken == set()


def test_a_downloaded_folder_is_the_same_encoder(hub: Hub, tmp_path: Path) -> None:
    hub.repos["tissue/vit"] = repo = repository()
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, data in repo.files.items():
        (folder / name).write_bytes(data)
    online, local, file = (
        resolve_encoder(one).card for one in ("hf-hub:tissue/vit", str(folder), str(folder / "model.safetensors"))
    )
    for card in (local, file):
        assert (card.arch, card.mean, card.mpp, card.start_sha256) == (
            online.arch, online.mean, online.mpp, online.start_sha256,
        )  # fmt: skip
    assert (local.licence, file.licence) == ("some-tissue-1.0", "Some Tissue License")


def test_timms_weights_by_tag(hub: Hub) -> None:
    side = 160
    torch.manual_seed(2)
    model = timm.create_model("test_vit")  # with its classifier, as on the hub
    hub.repos["timm/test_vit.r160_in1k"] = Repo(
        {"model.safetensors": save(model.state_dict()), "README.md": b"---\nlicense: apache-2.0\n---\n"}
    )
    for source in ("timm:test_vit.r160_in1k", "timm:test_vit"):
        found = resolve_encoder(source)
        assert found.card.licence == "apache-2.0" and found.card.start == f"timm:test_vit.r160_in1k@{COMMIT}"
        assert (found.card.arch, found.card.input_size, found.card.mean) == ("timm:test_vit", side, (0.5, 0.5, 0.5))
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        expected = model.eval().forward_head(model.forward_features(x), pre_logits=True)
        torch.testing.assert_close(found.encoder(x), expected, rtol=1e-5, atol=1e-5)
    for source, words in (
        ("timm:test_vit.none", "timm has no weights 'none' of test_vit; did you mean|there are"),
        ("timm:vit_of_nobody.x", "timm has no vit_of_nobody"),
        ("timm:test_vit,reg_tokens=2", "arguments belong to model.arch"),
    ):
        with pytest.raises(InputError, match=words):
            resolve_encoder(source)
    with pytest.raises(InputError, match="is a timm:test_vit, not a resnet18; use --model.arch timm:test_vit"):
        resolve_encoder("timm:test_vit", arch="resnet18")
