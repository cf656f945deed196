"""Backbone interface, and the registry that builds one by name."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ca2cl.common.arch_names import TIMM, canonical_arch
from ca2cl.common.plugins import find_installed, installed, is_plugin, load_plugin
from ca2cl.config import Pooling
from ca2cl.errors import InputError
from ca2cl.models.batch_norm import BatchNorm, Norm
from ca2cl.models.blocks.drop_path import row_draws
from ca2cl.models.blocks.layers import Matcher, block_modules, layer_numbers
from ca2cl.models.blocks.recompute import recompute
from ca2cl.models.features import Encoded, Level, Tokens, pool
from ca2cl.models.perturbed_conv import Stem

TRUSTED = "CA2CL_BACKBONES"
"""Environment variable: builders outside this package that encoders' cards may name, separated by commas."""
DEFAULT_ARCH = "resnet18"
HEAD = "fc."
"""Beginning of a linear head's tensors, where one lies with a backbone's."""
_LONGEST = 500
_INSIDE = re.compile(r"[a-z]\w*:\w[\w.-]*(,\w+=[\w.+-]+)*|[A-Za-z]\w*")


class Backbone(nn.Module):
    """Base class of encoder bodies: normalised tiles to pooled features.

    A subclass sets the attributes and writes ``forward``. Its tensors may have any names that do not begin with
    ``fc.``, which is a classifier's. ``BatchNorm`` layers, if it has any, are ``ca2cl.models.batch_norm``'s.

    Attributes:
        arch: name that ``build_encoder`` takes for it.
        feature_dim: length of a feature vector.
        pooling: how features are pooled over positions: the body's own way (default), its class token, the mean over
            patches, or both, one after the other.
        stem: first convolution, or patch embedding; the adversary perturbs its weight.
        patch_size: the side of a tile must be a multiple of it.
        heads: beginnings of tensors that a file of this architecture may hold beside the backbone's.
        poolings: the ways in which ``encode`` pools its tokens, beside ``default``; none for bodies without tokens.
        any_size: False for bodies that take tiles of the size that they were built for only.
    """

    arch: str
    feature_dim: int
    pooling: Pooling = "default"
    stem: Stem
    patch_size: int = 1
    heads: tuple[str, ...] = (HEAD,)
    poolings: tuple[Pooling, ...] = ()
    any_size: bool = True

    def forward(self, x_BCHW: Tensor, stem_delta: Tensor | None = None) -> Tensor:
        """Features h (B, feature_dim) of normalised tiles (B, 3, H, W).

        Args:
            stem_delta: added to the stem's weight for this pass, of its shape. An input and not a write to the
                parameter, so that nothing must be restored and ZeRO cannot lose it (DeepSpeed#5667).
        """
        raise NotImplementedError

    def tokens(self, x_BCHW: Tensor, stem_delta: Tensor | None = None) -> Tokens:
        """Features by position of normalised tiles (B, 3, H, W), where the body has them.

        Raises:
            InputError: it has none.
        """
        raise InputError(f"{self.arch} has no features by patch; use a ViT or a convolutional body")

    def encode(self, x_BCHW: Tensor, poolings: Iterable[Pooling] = ("default",)) -> Encoded:
        """Features of normalised tiles (B, 3, H, W), pooled in several ways, and by position.

        Args:
            poolings: ``default``, or of the attribute ``poolings``.

        Raises:
            InputError: the body has no features by position.
        """
        tokens = self.tokens(x_BCHW)
        return Encoded({way: self(x_BCHW) if way == "default" else pool(tokens, way) for way in poolings}, tokens)

    def check_tokens(self, poolings: Iterable[Pooling], source: str) -> None:
        """Refuse a pooling that ``encode`` cannot make.

        Args:
            poolings: the setting ``tokens``.
            source: name of the encoder, for the message.

        Raises:
            InputError: the body has no such tokens.
        """
        for way in poolings:
            if way not in self.poolings:
                lacks = "no class token; use mean" if self.poolings else "no tokens to pool; leave it out"
                raise InputError(f"tokens is {way!r}: encoder {source!r}, a {self.arch}, has {lacks}")

    @property
    def levels(self) -> tuple[Level, ...]:
        """Maps that ``maps`` returns, from fine to coarse: a plain ViT has one, other bodies one for each of their
        strides. Empty for a body without maps."""
        return ()

    def maps(self, x_BCHW: Tensor) -> list[Tensor]:
        """Feature maps (B, channels, H / stride, W / stride) of normalised images, one for each of ``levels``.

        Args:
            x_BCHW: images whose sides the largest stride divides; of other sizes than the tiles after
                ``take_any_size``.

        Raises:
            InputError: the body has none.
        """
        raise InputError(f"{self.arch} has no feature maps; use a convolutional body, a Swin or a ViT")

    def take_any_size(self) -> None:
        """Prepare ``maps`` for images of other sizes than the tiles. Tensors stay as they are."""

    def fitted(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``state`` for this image size: where tensors depend on it (position embeddings), they are resampled."""
        return state

    def group_matcher(self, coarse: bool = False) -> Matcher:
        """Regular expressions of parameter names, as a timm model has them: of the stem, and of the blocks by number.

        Raises:
            InputError: the body does not say.
        """
        raise InputError(
            f"model.arch is {self.arch!r}: its layers have no order (group_matcher), which optim.layer_decay, "
            "optim.freeze_layers and model.checkpoint_activations need; leave these out"
        )

    def no_weight_decay(self) -> Iterable[str]:
        """Names of parameters of several dimensions that weight decay spares with ``optim.decay_all false``."""
        return ()

    def layers(self, coarse: bool = False) -> dict[str, int]:
        """The layer of every parameter by name, from 0, the stem's; what is not there is trained like heads.

        Args:
            coarse: number the stages of a body that has any, and not its blocks.

        Raises:
            InputError: see ``group_matcher``.
        """
        return layer_numbers([name for name, _ in self.named_parameters()], self.group_matcher(coarse))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks keep only their input for the backward pass, and compute the rest again.

        Raises:
            InputError: see ``group_matcher``.
        """
        recompute(self.blocks(), enable)

    def blocks(self) -> list[nn.Module]:
        """The residual or transformer blocks behind the stem.

        Raises:
            InputError: see ``group_matcher``.
        """
        return block_modules(self, self.layers())

    def renamed(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``state`` under this body's names, where it knows other names of the same tensors."""
        return state


@dataclass(frozen=True, kw_only=True)
class BackboneOptions:
    """Options that a builder receives with the name.

    Attributes:
        norm: whose samples BatchNorm's statistics are taken over while training.
        group: tiles that share them, where ``norm`` is lane_group.
        image_size: side in pixels of the tiles that it will see.
        identity_blocks: start every residual block as the identity, as training from scratch wants; for bodies that
            have such a start.
        drop_path: rate of drop path in the last block, for bodies that have it (``blocks.drop_path``).
        pooling: see ``Backbone``.
    """

    norm: Norm = "sync"
    group: int = 16
    image_size: int = 224
    identity_blocks: bool = False
    drop_path: float = 0.0
    pooling: Pooling = "default"


Builder = Callable[[str, BackboneOptions], Backbone]
"""Full name and options → a freshly initialised backbone, its random numbers from torch's global generator."""


@dataclass(frozen=True)
class Entry:
    """Where a backbone's builder is, and the packages that it needs beside those of every encoder."""

    builder: str
    packages: tuple[str, ...] = ()


BACKBONES: dict[str, Entry] = {
    "resnet18": Entry("ca2cl.models.resnet:build"),
    "resnet34": Entry("ca2cl.models.resnet:build"),
    "resnet50": Entry("ca2cl.models.resnet:build"),
    TIMM: Entry("ca2cl.models.timm.body:build", ("timm",)),
}
"""By name, or by the beginning of names, up to and with a colon."""


GROUP = "ca2cl.backbones"
"""Group of entry points by which installed packages name builders."""


def find_entry(arch: str) -> Entry | None:
    """The registry's entry for a name, or an installed package's; None where there is none.

    Raises:
        InputError: several packages have that name.
    """
    prefix, colon, _ = canonical_arch(arch).partition(":")
    if prefix + colon in BACKBONES or is_plugin(arch):
        return BACKBONES.get(prefix + colon)
    found = find_installed(GROUP, arch, "model.arch")
    return Entry(found.path, (found.package,)) if found else None


def is_arch(arch: object) -> bool:
    """Whether a card may have this as its architecture: a known name, or that of a builder outside this package."""
    if not isinstance(arch, str) or len(arch) > _LONGEST:
        return False
    arch = canonical_arch(arch)
    return bool((_INSIDE.fullmatch(arch) and find_entry(arch)) or is_plugin(arch))


def check_arch(arch: str, field: str = "model.arch") -> None:
    """Refuse a name that neither is known nor can be a builder's.

    Raises:
        InputError: with the nearest known name; or the name is a package's as well.
    """
    find_installed(GROUP, arch, field, BACKBONES)
    if not is_arch(arch):
        names = [f"{name}NAME" if name.endswith(":") else name for name in BACKBONES]
        names += [one.name for one in installed(GROUP)]
        close = difflib.get_close_matches(arch.lower(), names, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise InputError(
            f"{field} is {arch!r}: {meant}use one of {', '.join(names)}, or package.module:builder for one of your own"
        )


def check_trusted(arch: str, source: str, named: str | None = None) -> None:
    """Refuse to import code because a file says so: a builder outside this package must be named by the user.

    Args:
        arch: what the card of an encoder has.
        source: where that is written.
        named: what the user gave as architecture.

    Raises:
        InputError: it is named neither by that nor in the environment.
    """
    trusted = [name.strip() for name in os.environ.get(TRUSTED, "").split(",")]
    if is_plugin(arch) and arch != named and arch not in trusted:
        raise InputError(
            f"{source}: is a {arch}, which is code outside ca2cl; if you trust it, set {TRUSTED}={arch} in the "
            "environment and start again"
        )


def build_encoder(
    arch: str = DEFAULT_ARCH,
    norm: Norm = "sync",
    *,
    group: int = 16,
    image_size: int = 224,
    identity_blocks: bool = False,
    drop_path: float = 0.0,
    pooling: Pooling = "default",
) -> Backbone:
    """A freshly initialised backbone (from torch's global generator); a name of the user's own code is imported.

    Args:
        arch: a name of ``BACKBONES``, or ``package.module:builder`` (see ``Builder``).
        norm: see ``BackboneOptions``, as the others.

    Raises:
        InputError: the name is unknown, or the body cannot be built.
    """
    check_arch(arch)
    arch = canonical_arch(arch)
    entry = find_entry(arch) or Entry(arch)
    options = BackboneOptions(
        norm=norm, group=group, image_size=image_size, identity_blocks=identity_blocks, pooling=pooling,
        drop_path=drop_path,
    )  # fmt: skip
    builder: Builder = load_plugin(entry.builder, "model.arch")
    backbone = builder(arch, options)
    _check_contract(backbone, arch, pooling)
    if drop_path and row_draws(backbone) is None:
        raise InputError(
            f"model.drop_path is {drop_path}: {arch} has no drop path; use --model.drop_path 0, or a timm body with it"
        )
    return backbone


def _check_contract(backbone: Backbone, arch: str, pooling: Pooling) -> None:
    if not isinstance(backbone, Backbone) or not isinstance(backbone.stem, Stem):
        raise InputError(
            f"model.arch is {arch!r}: its builder gives a {type(backbone).__name__}; return a "
            "ca2cl.models.backbone.Backbone whose stem is a ca2cl.models.perturbed_conv.Stem"
        )
    backbone.arch = arch
    if backbone.pooling != pooling:
        raise InputError(f"model.pooling is {pooling!r}: {arch} pools in one way only; use default")
    foreign = [layer for layer in backbone.modules() if _keeps_statistics(layer)]
    if foreign:
        raise InputError(
            f"model.arch is {arch!r}: has a {type(foreign[0]).__name__}, whose statistics model.norm does not rule; "
            "use ca2cl.models.batch_norm.BatchNorm"
        )
    head = next((name for name in backbone.state_dict() if name.startswith(HEAD)), None)
    if head:
        raise InputError(f"model.arch is {arch!r}: its tensor {head} has a classifier's name; rename it")


def _keeps_statistics(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.batchnorm._BatchNorm) and not isinstance(layer, BatchNorm)


def outline(arch: str, norm: Norm = "sync", *, image_size: int = 224, pooling: Pooling = "default") -> Backbone:
    """A backbone of the shape of ``build_encoder``'s, made quickly: on the meta device, where its builder can do that.
    Nothing is drawn from the caller's generator.

    Raises:
        InputError: see ``build_encoder``.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return build_encoder(arch, norm, image_size=image_size, pooling=pooling)
        except (RuntimeError, NotImplementedError):  # a builder that reads numbers of its tensors
            return build_encoder(arch, norm, image_size=image_size, pooling=pooling)


def has_batch_norm(backbone: nn.Module) -> bool:
    """Whether ``model.norm`` changes anything."""
    return any(isinstance(layer, BatchNorm) for layer in backbone.modules())
