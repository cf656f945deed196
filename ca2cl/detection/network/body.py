"""Bodies of detectors: encoders with feature maps, frozen in part.

A hierarchical body has maps at strides 4, 8, 16 and 32, a plain one (a ViT) a single map. A plain body's stride may be
no power of two (14), which the boxes and regions of detectors need: such a body sees the image resized by its stride
over the nearest power of two, and its map then has that stride.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ca2cl.errors import InputError
from ca2cl.models.backbone import Backbone, build_encoder
from ca2cl.models.batch_norm import BatchNorm, Norm
from ca2cl.models.features import Level

STRIDES = (4, 8, 16, 32)
"""Strides of a pyramid's levels (Lin et al., arXiv 1612.03144, section 4)."""
_TRIAL = (96, 160)  # no multiple of what a body with fixed windows may divide an image into
_ANOTHER = "use a ResNet, ConvNeXt, EfficientNet, Swin or plain ViT"


def build_body(arch: str, norm: Norm, input_size: int, frozen_stages: int = 0) -> Backbone:
    """A new body for images of any size. What its maps do not depend on is not trained.

    Args:
        arch: see ``build_encoder``.
        norm: likewise.
        input_size: side in pixels of the encoder's tiles, which its position embeddings are for.
        frozen_stages: see ``freeze``.

    Raises:
        InputError: a body that no pyramid can be built on, or fewer stages.
    """
    body = build_encoder(arch, norm, image_size=input_size)
    body.take_any_size()
    with torch.enable_grad():
        used = _leaves(_tried(body))
    for parameter in body.parameters():
        parameter.requires_grad_(id(parameter) in used)
    freeze(body, frozen_stages)
    return body


def check_body(encoder: Backbone, frozen_stages: int = 0) -> None:
    """Refuse an encoder that no detector can be built on. It stays as it is.

    Raises:
        InputError: no suitable maps, tiles of one size only, or fewer stages.
    """
    with torch.no_grad():
        _tried(encoder)
    _stage_numbers(encoder, frozen_stages)


def pyramid_levels(body: Backbone) -> tuple[Level, ...]:
    """The levels of ``body`` that a pyramid is built on, with the strides that ``pyramid_maps`` gives: four, or one.

    Raises:
        InputError: it has others.
    """
    levels = {level.stride: level for level in body.levels}
    if set(STRIDES) <= levels.keys():
        return tuple(levels[stride] for stride in STRIDES)
    if len(levels) == 1:
        (level,) = levels.values()
        stride = 2 ** round(math.log2(level.stride))
        if stride in STRIDES:
            return (Level(level.channels, stride),)
    has = f"feature maps at strides {', '.join(map(str, levels))}" if levels else "no feature maps"
    raise InputError(f"detect is not for {body.arch}: it has {has}, not one map or strides 4, 8, 16, 32; {_ANOTHER}")


def pyramid_maps(body: Backbone, images_BCHW: Tensor) -> list[Tensor]:
    """Maps (B, C, H / stride, W / stride), one for each of ``pyramid_levels``.

    Args:
        body: the encoder.
        images_BCHW: normalised, their sides multiples of 32.
    """
    wanted = pyramid_levels(body)
    if len(wanted) == 1 and wanted[0].stride != body.levels[0].stride:
        sides = [side // wanted[0].stride * body.levels[0].stride for side in images_BCHW.shape[-2:]]
        images_BCHW = F.interpolate(images_BCHW, sides, mode="bilinear", align_corners=False, antialias=True)
    maps = zip(body.levels, body.maps(images_BCHW), strict=True)
    return [one for level, one in maps if len(wanted) == 1 or level in wanted]


def freeze(body: Backbone, stages: int) -> None:
    """Take the first ``stages`` stages out of the training, the stem counting as the first.

    Stages are a hierarchical body's own and the blocks of a ViT (``Backbone.group_matcher``). BatchNorm layers in them
    normalise by the running statistics.

    Raises:
        InputError: it has fewer, or does not number them.
    """
    numbers = _stage_numbers(body, stages)
    for path, module in body.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if numbers.get(f"{path}.{name}" if path else name, stages) < stages:
                parameter.requires_grad_(False)
                if isinstance(module, BatchNorm):
                    module.norm = "frozen"


def load_body(body: Backbone, encoder: Mapping[str, Tensor], source: str) -> None:
    """Give the body the encoder's tensors.

    Raises:
        InputError: a tensor that either side has and the other has not, or of another shape.
    """
    try:
        body.load_state_dict(dict(encoder), strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{source}: does not fill the detector's backbone exactly ({reason}); give another") from None


def _stage_numbers(body: Backbone, stages: int) -> dict[str, int]:
    """The stage of every parameter by name, where any are to be frozen."""
    if not stages:
        return {}
    try:
        numbers = body.layers(coarse=True)
    except (InputError, AssertionError, NotImplementedError):
        raise InputError(f"frozen_stages is {stages}: {body.arch} does not number its stages; use 0") from None
    last = max(numbers.values()) + 1
    if stages > last:
        raise InputError(f"frozen_stages is {stages}: use 0 to {last}, the stem and {last - 1} stages of {body.arch}")
    return numbers


def _tried(body: Backbone) -> list[Tensor]:
    """Maps of an image that is neither square nor of the tiles' size."""
    levels, training = pyramid_levels(body), body.training
    body.eval()
    try:
        maps = pyramid_maps(body, torch.zeros(1, 3, *_TRIAL))
    except (RuntimeError, ValueError, AssertionError, TypeError, InputError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(
            f"detect is not for {body.arch}: it takes no images of other sizes than its tiles ({reason}); {_ANOTHER}"
        ) from None
    finally:
        body.train(training)
    shapes = [(level.channels, *(side // level.stride for side in _TRIAL)) for level in levels]
    if [tuple(one.shape[1:]) for one in maps] != shapes:
        raise InputError(f"detect is not for {body.arch}: its maps have not the shapes that it states; {_ANOTHER}")
    return maps


def _leaves(outputs: Iterable[Tensor]) -> set[int]:
    """Identities of the parameters that ``outputs`` depend on, by autograd's graph."""
    nodes, seen, found = [output.grad_fn for output in outputs], set(), set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        nodes += [one for one, _ in node.next_functions]
    return found
