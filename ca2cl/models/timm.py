"""timm's bodies as backbones, by the name ``timm/NAME``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ca2cl.common.optional import need
from ca2cl.errors import InputError
from ca2cl.models.backbone import HEAD, Backbone, BackboneOptions
from ca2cl.models.batch_norm import BatchNorm
from ca2cl.models.blocks.drop_path import RowDraws
from ca2cl.models.blocks.layers import Matcher, layer_numbers
from ca2cl.models.perturbed_conv import Stem

PREFIX = "timm/"
REMEDY = 'pip install "ca2cl[timm]"'
_BODY = "body."


class TimmBackbone(Backbone):
    """A timm model without its classifier, pooled as timm pools it. The state's keys are timm's.

    Dropout is off, whatever timm's default, and stochastic depth is ours: the passes of a step must see one network.
    """

    body: Any

    def __init__(self, arch: str, options: BackboneOptions) -> None:
        super().__init__()
        timm = need("timm", REMEDY)
        name = timm_name(arch)
        settings = timm.get_pretrained_cfg(name)
        self.body = _create(timm, name, options.image_size, options.drop_path)
        self.arch = arch
        self.feature_dim = int(getattr(self.body, "head_hidden_size", None) or self.body.num_features)
        patches = getattr(self.body, "patch_embed", None)
        self.patch_size = int(getattr(patches, "patch_size", (1,))[0])
        # True and False are of ViTs; other bodies with position embeddings see one size only
        self._any_size = not settings.fixed_input_size or bool(getattr(self.body, "dynamic_img_size", False))
        self._image_size = options.image_size
        classifiers = settings.classifier
        self.heads = (HEAD, *(f"{one}." for one in ([classifiers] if isinstance(classifiers, str) else classifiers)))
        self._check_size(options.image_size)
        self._replace_stem(settings.first_conv)
        _replace_norms(self.body, options)
        if options.drop_path:
            _replace_drop_paths(self.body)
        _turn_off_dropout(self.body)
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
            features: Tensor = self.body(x_BCHW)
        return features

    def fitted(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``state`` with its absolute position embeddings resampled to this image size, as timm does."""
        given, own = state.get("pos_embed"), getattr(self.body, "pos_embed", None)
        if given is None or own is None or given.shape == own.shape or given.ndim != 3:
            return state
        prefixes = 0 if getattr(self.body, "no_embed_class", False) else getattr(self.body, "num_prefix_tokens", 1)
        grid, resample = list(self.body.patch_embed.grid_size), need("timm.layers", REMEDY).resample_abs_pos_embed
        return {**state, "pos_embed": resample(given, new_size=grid, num_prefix_tokens=prefixes)}

    def group_matcher(self, coarse: bool = False) -> Matcher:
        """timm's, for names without the attribute that holds the model."""
        if not hasattr(self.body, "group_matcher"):
            return super().group_matcher(coarse)
        matcher: Matcher = self.body.group_matcher(coarse=coarse)
        return matcher

    def layers(self) -> dict[str, int]:
        """As ``Backbone.layers``."""
        found = layer_numbers([name for name, _ in self.body.named_parameters()], self.group_matcher())
        return {_BODY + name: number for name, number in found.items()}

    def no_weight_decay(self) -> Iterable[str]:
        """As ``Backbone.no_weight_decay``: tokens, position embeddings, and what else timm names."""
        names = self.body.no_weight_decay() if hasattr(self.body, "no_weight_decay") else ()
        return [_BODY + name for name in names]

    def _replace_stem(self, path: str | tuple[str, ...]) -> None:
        stem = self.body.get_submodule(path) if isinstance(path, str) and path else None
        if stem is None or not Stem.fits(stem):
            found = type(stem).__name__ if stem is not None else f"of several parts: {path}"
            raise InputError(
                f"model.arch is {self.arch!r}: its first convolution is no plain one ({found}), which the adversary "
                "cannot perturb; use another body"
            )
        self._stem = str(path)
        stem = _put(self.body, self._stem, Stem.of(stem))
        self._perturbation = stem.perturbation

    def _check_size(self, side: int) -> None:
        if side % self.patch_size:
            near = max(1, round(side / self.patch_size)) * self.patch_size
            raise InputError(
                f"image size {side}: {self.arch} has patches of {self.patch_size} pixels; use a multiple, as {near}"
            )
        if not self._any_size and side != self._image_size:
            raise InputError(f"image size {side}: this {self.arch} takes tiles of {self._image_size} pixels only")


def build(arch: str, options: BackboneOptions) -> TimmBackbone:
    """A timm body with timm's initialisation; ``identity_blocks`` has no meaning for it."""
    return TimmBackbone(arch, options)


def timm_name(arch: str) -> str:
    """timm's own name of ``timm/NAME``.

    Raises:
        InputError: timm has no such model, with the nearest name; MissingPackage: it is not installed.
    """
    timm, name = need("timm", REMEDY), arch.removeprefix(PREFIX)
    # the list, and not create_model: that would follow names of repositories on the hub
    known = timm.list_models()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        raise InputError(
            f"model.arch is {arch!r}: timm has no {name}; "
            + (f"did you mean {PREFIX}{close[0]}?" if close else "see timm.list_models()")
        )
    return name


def size_arguments(arch: str, image_size: int) -> dict[str, Any]:
    """What ``timm.create_model`` must be given for tiles of that size: nothing for a body that takes any."""
    fixed = need("timm", REMEDY).get_pretrained_cfg(timm_name(arch)).fixed_input_size
    return {"img_size": image_size} if fixed else {}


def _create(timm: Any, name: str, image_size: int, drop_path: float = 0.0) -> nn.Module:
    """Without its classifier; where it can, a ViT also takes tiles of other sizes than ``image_size`` afterwards."""
    size = size_arguments(PREFIX + name, image_size)
    options = {**size, **({"dynamic_img_size": True} if size else {})}
    if drop_path:
        options["drop_path_rate"] = drop_path
    while True:
        try:
            model: nn.Module = timm.create_model(name, num_classes=0, **options)
            return model
        except TypeError as error:  # of bodies that do not know an option
            unknown = [option for option in ("dynamic_img_size", "drop_path_rate") if option in str(error)]
            if not unknown or options.pop(unknown[0], None) is None:
                raise


class _NormAct(BatchNorm):
    """timm's BatchNorm with an activation of its own."""

    act: nn.Module
    drop: nn.Module

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x: Tensor = self.act(self.drop(super().forward(x_BCHW)))
        return x


def _replace_norms(body: nn.Module, options: BackboneOptions) -> None:
    """Put ours in the place of every BatchNorm, with its very tensors."""
    for path, layer in list(body.named_modules()):
        if not isinstance(layer, nn.BatchNorm2d):
            continue
        kind = _NormAct if hasattr(layer, "act") else BatchNorm
        own = kind(layer.num_features, options.norm, options.group)
        own.eps, own.momentum = layer.eps, layer.momentum
        own._parameters, own._buffers = layer._parameters, layer._buffers
        own._modules = layer._modules
        _put(body, path, own)


def _put(model: nn.Module, path: str, module: Any) -> Any:
    """``module`` in the place that ``path`` names."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
    return module


def _replace_drop_paths(body: nn.Module) -> None:
    """Put ours in the place of timm's, with their rates."""
    draws = RowDraws()
    for path, layer in list(body.named_modules()):
        if isinstance(layer, need("timm.layers", REMEDY).DropPath) and layer.drop_prob:
            _put(body, path, draws.layer(float(layer.drop_prob)))


def _turn_off_dropout(body: nn.Module) -> None:
    for module in body.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        # timm's DropPath and PatchDropout, and what models apply by a function
        for name in ("drop_prob", "prob", "drop_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


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
