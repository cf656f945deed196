"""timm's bodies as backbones, by the name ``timm:NAME``.

Shapes: B tiles, N tokens, P prefix tokens (class, registers), h x w patches, D features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from ca2cl.config import Pooling
from ca2cl.errors import InputError
from ca2cl.models.backbone import HEAD, Backbone, BackboneOptions
from ca2cl.models.blocks.layers import Matcher, layer_numbers
from ca2cl.models.features import Encoded, Level, Tokens
from ca2cl.models.perturbed_conv import Stem
from ca2cl.models.timm.adapt import adapted
from ca2cl.models.timm.layers import put, replace_drop_paths, replace_norms, turn_off_dropout
from ca2cl.models.timm.maps import find_levels, find_maps, keep_windows
from ca2cl.models.timm.spelling import built, create_arguments, settings_of, timm_name

_BODY = "body."
_AVERAGE = ("avg", "fast", "fastavg")


class TimmBackbone(Backbone):
    """A timm model without its classifier. The state's keys are timm's.

    Dropout is off, whatever timm's default, and stochastic depth is ours: the passes of a step must see one network.
    """

    body: Any

    def __init__(self, arch: str, options: BackboneOptions) -> None:
        super().__init__()
        settings = settings_of(arch)
        self.body = _create(arch, options.image_size, options.drop_path)
        self.arch, self.pooling = arch, options.pooling
        self.feature_dim = int(getattr(self.body, "head_hidden_size", None) or self.body.num_features)
        self._check_pooling()
        self.feature_dim *= 2 if self.pooling == "both" else 1
        side = getattr(getattr(self.body, "patch_embed", None), "patch_size", 1)  # XCiT has a number, ViTs a pair
        self.patch_size = int(side if isinstance(side, int) else side[0])
        # True and False are of ViTs; other bodies with position embeddings see one size only
        self.any_size = not settings.fixed_input_size or bool(getattr(self.body, "dynamic_img_size", False))
        self._image_size = options.image_size
        classifiers = settings.classifier
        self.heads = (HEAD, *(f"{one}." for one in ([classifiers] if isinstance(classifiers, str) else classifiers)))
        self._check_size(options.image_size)
        self._replace_stem(settings.first_conv)
        replace_norms(self.body, options)
        if options.drop_path:
            replace_drop_paths(self.body)
        turn_off_dropout(self.body)
        self.register_state_dict_post_hook(_drop_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_add_prefix)  # type: ignore[no-untyped-call]

    @property
    def stem(self) -> Stem:  # type: ignore[override]
        """The first convolution or patch embedding."""
        stem = self.body.get_submodule(self._stem)
        assert isinstance(stem, Stem)
        return stem

    def forward(self, x_BCHW: Tensor, stem_delta: Tensor | None = None) -> Tensor:
        """Features h (B, feature_dim); see ``Backbone``."""
        self._check_size(x_BCHW.shape[-1])
        with self._perturbation.of(stem_delta):
            if not self._pools_tokens:
                features: Tensor = self.body(x_BCHW)
                return features
            x_BND = self.body.forward_features(x_BCHW)
        return self._pooled(x_BND, self.pooling)

    def tokens(self, x_BCHW: Tensor, stem_delta: Tensor | None = None) -> Tokens:
        """Features by patch; see ``Backbone``."""
        self._check_size(x_BCHW.shape[-1])
        with self._perturbation.of(stem_delta):
            x = self.body.forward_features(x_BCHW)
        return self._by_position(x, x_BCHW)

    def encode(self, x_BCHW: Tensor, poolings: Iterable[Pooling] = ("default",)) -> Encoded:
        """As ``Backbone.encode``, in one pass."""
        self._check_size(x_BCHW.shape[-1])
        x = self.body.forward_features(x_BCHW)
        pooled = {way: self._pooled(x, self.pooling if way == "default" else way) for way in poolings}
        return Encoded(pooled, self._by_position(x, x_BCHW))

    @property
    def poolings(self) -> tuple[Pooling, ...]:  # type: ignore[override]
        """Those of a ViT; one without a class token has the mean alone."""
        if not hasattr(self.body, "num_prefix_tokens"):
            return ()
        return ("class", "mean", "both") if _has_class_token(self.body) else ("mean",)

    def _pooled(self, x: Tensor, pooling: Pooling) -> Tensor:
        """Features (B, D) of timm's features by position."""
        if pooling not in self.poolings:  # its own way, which ``model.pooling mean`` may name, too
            own: Tensor = self.body.forward_head(x)
            return own
        parts = []
        if pooling in ("class", "both"):
            parts.append(x[:, 0])
        if pooling in ("mean", "both"):
            parts.append(x[:, self.body.num_prefix_tokens :].mean(1))
        norm = getattr(self.body, "fc_norm", None) or nn.Identity()  # the last norm, where timm's pooling precedes it
        return torch.cat([norm(part) for part in parts], 1)

    def _by_position(self, x: Tensor, x_BCHW: Tensor) -> Tokens:
        if x.ndim == 3:
            prefix = int(getattr(self.body, "num_prefix_tokens", 0))
            height, width = self._grid(x.shape[1] - prefix, x_BCHW)
            return Tokens(x[:, :prefix], x[:, prefix:].reshape(len(x), height, width, -1))
        last = x.shape[-1] == self.body.num_features and getattr(self.body, "output_fmt", "NHWC") != "NCHW"
        patches_BhwD = x if last else x.permute(0, 2, 3, 1)
        return Tokens(patches_BhwD.new_zeros(len(x), 0, patches_BhwD.shape[-1]), patches_BhwD)

    def _grid(self, count: int, x_BCHW: Tensor) -> tuple[int, int]:
        """Rows and columns of ``count`` patches; bodies with stages have larger ones in the last."""
        height, width = (side // self.patch_size for side in x_BCHW.shape[-2:])
        stride = isqrt(height * width // count)
        if height * width != count * stride * stride or height % stride or width % stride:
            raise InputError(f"{self.arch} has no features by patch; use a ViT or a convolutional body")
        return height // stride, width // stride

    @property
    def levels(self) -> tuple[Level, ...]:
        """As ``Backbone.levels``."""
        return tuple(find_levels(self.body))

    def maps(self, x_BCHW: Tensor) -> list[Tensor]:
        """As ``Backbone.maps``: outputs of stages, or of a plain ViT's last block behind the last norm."""
        places = find_levels(self.body)
        return find_maps(self.body, x_BCHW, list(places.values())) if places else super().maps(x_BCHW)

    def take_any_size(self) -> None:
        """As ``Backbone.take_any_size``."""
        keep_windows(self.body)

    def fitted(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``state`` with position embeddings resampled to this image size, as timm does."""
        own = self.state_dict()
        if all(name not in own or tensor.shape == own[name].shape for name, tensor in state.items()):
            return state
        return adapted(self.body, state)

    def renamed(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``state`` under timm's names, from those of the model's first authors; resampled as by ``fitted``."""
        return adapted(self.body, state)

    def group_matcher(self, coarse: bool = False) -> Matcher:
        """timm's, for names without the attribute that holds the model."""
        if not hasattr(self.body, "group_matcher"):
            return super().group_matcher(coarse)
        matcher: Matcher = self.body.group_matcher(coarse=coarse)
        return matcher

    def layers(self, coarse: bool = False) -> dict[str, int]:
        """As ``Backbone.layers``."""
        found = layer_numbers([name for name, _ in self.body.named_parameters()], self.group_matcher(coarse))
        return {_BODY + name: number for name, number in found.items()}

    def no_weight_decay(self) -> Iterable[str]:
        """As ``Backbone.no_weight_decay``: tokens, position embeddings, and what else timm names."""
        names = self.body.no_weight_decay() if hasattr(self.body, "no_weight_decay") else ()
        return [_BODY + name for name in names]

    @property
    def _pools_tokens(self) -> bool:
        return self.pooling != "default" and _has_class_token(self.body)

    def _check_pooling(self) -> None:
        if self.pooling == "default" or _has_class_token(self.body):
            return
        if self.pooling in ("class", "both"):
            raise InputError(
                f"model.pooling is {self.pooling!r}: {self.arch} has no class token; use default"
                + (" or mean" if _averages(self.body) else "")
            )
        if not _averages(self.body):
            raise InputError(f"model.pooling is 'mean': {self.arch} pools in a way of its own; use default")

    def _replace_stem(self, path: str | tuple[str, ...]) -> None:
        from timm.layers.conv2d_same import Conv2dSame

        stem = self.body.get_submodule(path) if isinstance(path, str) and path else None
        same = isinstance(stem, Conv2dSame)
        if stem is None or not Stem.fits(stem, same=same):
            found = type(stem).__name__ if stem is not None else f"of several parts: {path}"
            raise InputError(
                f"model.arch is {self.arch!r}: its first convolution is no plain one ({found}), which the adversary "
                "cannot perturb; use another body"
            )
        self._stem = str(path)
        stem = put(self.body, self._stem, Stem.of(stem, same=same))
        self._perturbation = stem.perturbation

    def _check_size(self, side: int) -> None:
        if side % self.patch_size:
            near = max(1, round(side / self.patch_size)) * self.patch_size
            raise InputError(
                f"image size {side}: {self.arch} has patches of {self.patch_size} pixels; use a multiple, as {near}"
            )
        if not self.any_size and side != self._image_size:
            raise InputError(f"image size {side}: this {self.arch} takes tiles of {self._image_size} pixels only")


def build(arch: str, options: BackboneOptions) -> TimmBackbone:
    """A timm body with timm's initialisation; ``identity_blocks`` has no meaning for it."""
    return TimmBackbone(arch, options)


def _create(arch: str, image_size: int, drop_path: float = 0.0) -> nn.Module:
    """Without its classifier; where it can, a ViT also takes tiles of other sizes than ``image_size`` afterwards.

    Raises:
        InputError: the model does not take an argument of the name.
    """
    import timm

    name, plain = timm_name(arch), create_arguments(arch, image_size)
    arguments = {**built(plain), "num_classes": 0}
    wished: dict[str, Any] = {"dynamic_img_size": True} if "img_size" in plain else {}
    if drop_path:
        wished["drop_path_rate"] = drop_path
    try:
        while True:
            try:
                model: nn.Module = timm.create_model(name, **arguments, **wished)
                break
            except TypeError as error:  # not every body knows it
                unknown = next((one for one in wished if one in str(error)), None)
                if unknown is None:
                    raise
                del wished[unknown]
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        outlined = torch.empty(0).device.type == "meta"  # outline() may meet a body that meta cannot build
        if isinstance(error, RuntimeError) and (outlined or "," not in arch):
            raise
        raise InputError(
            f"model.arch is {arch!r}: timm cannot build it ({str(error)[:200]}); see timm's {name}"
        ) from None
    return model


def _has_class_token(body: nn.Module) -> bool:
    return getattr(body, "cls_token", None) is not None and hasattr(body, "num_prefix_tokens")


def _averages(body: nn.Module) -> bool:
    """Whether the body's own pooling is the mean over positions."""
    pool = getattr(body, "global_pool", None)
    if pool is None or isinstance(pool, nn.Identity):
        pool = getattr(getattr(body, "head", None), "global_pool", pool)
    return (pool if isinstance(pool, str) else getattr(pool, "pool_type", "")) in _AVERAGE


def _drop_prefix(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """A hook after ``state_dict``: timm's names, without the attribute that holds the model."""
    for name in [name for name in state if name.startswith(prefix + _BODY)]:
        state[prefix + name[len(prefix + _BODY) :]] = state.pop(name)


def _add_prefix(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """A hook before ``load_state_dict``: the way back, for this image size."""
    assert isinstance(module, TimmBackbone)
    names = [name for name in state if name.startswith(prefix)]
    own = module.fitted({name[len(prefix) :]: state.pop(name) for name in names})
    state.update({f"{prefix}{_BODY}{name}": tensor for name, tensor in own.items()})
