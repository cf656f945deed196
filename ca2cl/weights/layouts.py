"""Layouts of checkpoint files, and which of their tensors are the encoder's.

A file of another program has the encoder's tensors in some dictionary, under some prefix, beside heads, a second
encoder and an optimizer. ``LAYOUTS`` is the table of the known ones. The names were checked against the programs that
write and read them: DINO's ``main_dino.py``, DINOv2's and DINOv3's ``train/train.py`` and ``hub/backbones.py``,
``main_lincls.py`` of MoCo v2 and v3, lightly's examples for PyTorch Lightning, and LightlyTrain's methods.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ca2cl.errors import InputError
from ca2cl.weights.transformers_names import is_transformers, timm_names

_ANY = ("state_dict", "model", "net", "")
_TRANSFORMERS = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")


class Layout(NamedTuple):
    """One way to keep an encoder.

    Attributes:
        name: program, and which of its encoders.
        inside: keys of the file's dictionaries that may hold it; empty for the file itself.
        prefix: beginning of its tensors' names there, after a wrapper's ``module.``.
    """

    name: str
    inside: tuple[str, ...]
    prefix: str


LAYOUTS = (
    Layout("DINO's, DINOv2's or DINOv3's teacher", ("teacher",), "backbone."),
    Layout("DINO's, DINOv2's or DINOv3's teacher", _ANY, "teacher.backbone."),
    Layout("DINOv3's averaged model", _ANY, "model_ema.backbone."),
    Layout("lightly's teacher", _ANY, "teacher_backbone."),
    Layout("lightly's teacher", _ANY, "teacher_backbone.vit."),
    Layout("LightlyTrain's teacher", _ANY, "teacher_embedding_model.wrapped_model._model."),
    Layout("timm's averaged model", ("state_dict_ema", "model_ema"), ""),
    Layout("MoCo v3's query encoder", _ANY, "base_encoder."),
    Layout("MoCo v2's query encoder", _ANY, "encoder_q."),
    Layout("DINO's, DINOv2's or DINOv3's student", ("student",), "backbone."),
    Layout("DINO's, DINOv2's or DINOv3's student", _ANY, "student.backbone."),
    Layout("lightly's student", _ANY, "student_backbone."),
    Layout("lightly's student", _ANY, "student_backbone.vit."),
    Layout("LightlyTrain's student", _ANY, "student_embedding_model.wrapped_model._model."),
    Layout("LightlyTrain's encoder", _ANY, "embedding_model.wrapped_model._model."),
    Layout("CA2CL's authors' encoder", _ANY, "resnet."),
    Layout("an encoder beside its heads, as lightly's", _ANY, "backbone."),
    Layout("an encoder beside its heads, as lightly's", _ANY, "backbone.vit."),
    Layout("an encoder beside its heads", _ANY, "encoder."),
    Layout("MoCo v3's momentum encoder", _ANY, "momentum_encoder."),
    Layout("MoCo v2's key encoder", _ANY, "encoder_k."),
    Layout("lightly's momentum encoder", _ANY, "backbone_momentum."),
    Layout("a plain encoder, as timm's and torchvision's", _ANY, ""),
    Layout("a plain encoder", _ANY, "model."),
    *(Layout("transformers' encoder beside a head", ("",), f"{name}.") for name in _TRANSFORMERS),
    Layout("a teacher", ("teacher",), ""),
    Layout("a student", ("student",), ""),
)
"""In order of preference: of two encoders in a file, the teacher or the one that its authors evaluate comes first."""
_LEFT_OUT = re.compile(
    r"mask_token$|(^|\.)rope_embed\.periods$|\.bias_mask$|^local_cls_norm\.|\.relative_position_index$|\.attn_mask$"
)
"""Tensors that only pre-training needs, or that are constants of the architecture."""
_ENOUGH = 0.5  # share of a body's names by which a layout is recognised; what is missing is then an error
_CHUNKED = re.compile(r"blocks\.\d+\.(\d+)\.")
_NUMBERED = ("conv1", "bn1", "", "", "layer1", "layer2", "layer3", "layer4")
"""torchvision's names of a ResNet's children, by their number in ``nn.Sequential(*resnet.children())``."""


class Taken(NamedTuple):
    """Tensors of an encoder under its own or its first authors' names, and a description of the layout."""

    state: dict[str, Tensor]
    layout: str


def take(raw: Any, wanted: Mapping[str, Tensor], source: str) -> Taken:
    """The encoder's tensors in a file.

    Args:
        raw: content of the file.
        wanted: the body's own state, for its names.
        source: the file, for messages.

    Raises:
        InputError: no named tensors in it.
    """
    if not isinstance(raw, Mapping):
        raise InputError(f"encoder {source!r}: holds a {type(raw).__name__}, not named tensors; give weights")
    found = [(len(taken.state.keys() & wanted.keys()), len(taken.state), taken) for taken in _candidates(raw)]
    if not found:
        raise InputError(f"encoder {source!r}: no named tensors in it ({_shown(raw)}); give weights")
    for fitting, _, taken in found:
        if fitting >= _ENOUGH * len(wanted):
            return taken
    # another program's names, which the body may know, or another architecture, which is said by name
    return max(found, key=lambda one: one[:2])[2]


def left_out(name: str, tensor: Tensor) -> bool:
    """Whether a tensor of a file may be left without a place: see ``_LEFT_OUT``. DINOv3's distilled models have biases
    of zeros, which timm's do not have."""
    return bool(_LEFT_OUT.search(name)) or (name.endswith("qkv.bias") and not tensor.any())


def _candidates(raw: Mapping[str, Any]) -> Iterator[Taken]:
    for layout in LAYOUTS:
        for key in layout.inside:
            content = raw.get(key) if key else raw
            if not isinstance(content, Mapping):
                continue
            state = _named(content)
            inner = {name[len(layout.prefix) :]: one for name, one in state.items() if name.startswith(layout.prefix)}
            if inner:
                where = ", ".join([f"in {key!r}"] * bool(key) + [f"under {layout.prefix}*"] * bool(layout.prefix))
                if is_transformers(inner):
                    yield Taken(timm_names(inner), f"transformers'{f' ({where})' if where else ''}")
                yield Taken(_renumbered(inner), f"{layout.name}{f' ({where})' if where else ''}")


def _named(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Its tensors, without the names of wrappers: ``DistributedDataParallel``'s and ``torch.compile``'s."""
    state = {str(name).replace("_orig_mod.", ""): one for name, one in content.items() if isinstance(one, Tensor)}
    return {name.removeprefix("module."): one for name, one in state.items()}


def _renumbered(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without DINOv2's chunks of blocks (``blocks.CHUNK.BLOCK``), and with a ResNet's names in place of numbers."""
    blocks = [name for name in state if name.startswith("blocks.")]
    if blocks and all(_CHUNKED.match(name) for name in blocks):
        whole = {_CHUNKED.sub(r"blocks.\1.", name, count=1): one for name, one in state.items()}
        # DINOv2 numbers blocks through all chunks; an EfficientNet's (blocks.STAGE.BLOCK) begin again in each stage
        state = whole if len(whole) == len(state) else state
    if "0.weight" in state and "4.0.conv1.weight" in state:
        state = {_by_name(name): one for name, one in state.items()}
    return state


def _by_name(name: str) -> str:
    number, dot, rest = name.partition(".")
    known = number.isdecimal() and int(number) < len(_NUMBERED)
    return f"{_NUMBERED[int(number)]}{dot}{rest}" if known else name


def _shown(raw: Mapping[str, Any]) -> str:
    names = [str(name) for name in raw][:5]
    return f"but {', '.join(names)}" if names else "it is empty"
