"""Backbone interface, and the registry that builds one by name."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ca2cl.common.plugins import find_installed, installed, is_plugin, load_plugin
from ca2cl.errors import InputError
from ca2cl.models.batch_norm import BatchNorm, Norm
from ca2cl.models.perturbed_conv import Stem

TRUSTED = "CA2CL_BACKBONES"
"""Environment variable: builders outside this package that encoders' cards may name, separated by commas."""
DEFAULT_ARCH = "resnet18"
HEAD = "fc."
"""Beginning of a linear head's tensors, where one lies with a backbone's."""
_INSIDE = re.compile(r"[\w.]+/[\w.-]+|[A-Za-z]\w*")


class Backbone(nn.Module):
    """Base class of encoder bodies: normalised tiles to pooled features.

    A subclass sets the attributes and writes ``forward``. Its tensors may have any names that do not begin with
    ``fc.``, which is a classifier's. ``BatchNorm`` layers, if it has any, are ``ca2cl.models.batch_norm``'s.

    Attributes:
        arch: name that ``build_encoder`` takes for it.
        feature_dim: length of a feature vector.
        stem: first convolution, or patch embedding; the adversary perturbs its weight.
        patch_size: the side of a tile must be a multiple of it.
        heads: beginnings of tensors that a file of this architecture may hold beside the backbone's.
    """

    arch: str
    feature_dim: int
    stem: Stem
    patch_size: int = 1
    heads: tuple[str, ...] = (HEAD,)

    def forward(self, x_BCHW: Tensor, stem_delta: Tensor | None = None) -> Tensor:
        """Features h (B, feature_dim) of normalised tiles (B, 3, H, W).

        Args:
            stem_delta: added to the stem's weight for this pass, of its shape. An input and not a write to the
                parameter, so that nothing must be restored and ZeRO cannot lose it (DeepSpeed#5667).
        """
        raise NotImplementedError

    def fitted(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``state`` for this image size: where tensors depend on it (position embeddings), they are resampled."""
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
    """

    norm: Norm = "sync"
    group: int = 16
    image_size: int = 224
    identity_blocks: bool = False


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
    "timm/": Entry("ca2cl.models.timm:build", ("timm",)),
}
"""By name, or by the beginning of names, up to and with a slash."""


GROUP = "ca2cl.backbones"
"""Group of entry points by which installed packages name builders."""


def find_entry(arch: str) -> Entry | None:
    """The registry's entry for a name, or an installed package's; None where there is none.

    Raises:
        InputError: several packages have that name.
    """
    prefix, slash, _ = arch.partition("/")
    if prefix + slash in BACKBONES or is_plugin(arch):
        return BACKBONES.get(prefix + slash)
    found = find_installed(GROUP, arch, "model.arch")
    return Entry(found.path, (found.package,)) if found else None


def is_arch(arch: object) -> bool:
    """Whether a card may have this as its architecture: a known name, or that of a builder outside this package."""
    return isinstance(arch, str) and bool(
        (_INSIDE.fullmatch(arch) and find_entry(arch)) or (len(arch) < 200 and is_plugin(arch))
    )


def check_arch(arch: str, field: str = "model.arch") -> None:
    """Refuse a name that neither is known nor can be a builder's.

    Raises:
        InputError: with the nearest known name; or the name is a package's as well.
    """
    find_installed(GROUP, arch, field, BACKBONES)
    if not is_arch(arch):
        names = [f"{name}NAME" if name.endswith("/") else name for name in BACKBONES]
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
) -> Backbone:
    """A freshly initialised backbone (from torch's global generator); a name of the user's own code is imported.

    Args:
        arch: a name of ``BACKBONES``, or ``package.module:builder`` (see ``Builder``).
        norm: see ``BackboneOptions``, as the others.

    Raises:
        InputError: the name is unknown, or the body cannot be built.
    """
    check_arch(arch)
    entry = find_entry(arch) or Entry(arch)
    options = BackboneOptions(norm=norm, group=group, image_size=image_size, identity_blocks=identity_blocks)
    builder: Builder = load_plugin(entry.builder, "model.arch")
    backbone = builder(arch, options)
    _check_contract(backbone, arch)
    return backbone


def _check_contract(backbone: Backbone, arch: str) -> None:
    if not isinstance(backbone, Backbone) or not isinstance(backbone.stem, Stem):
        raise InputError(
            f"model.arch is {arch!r}: its builder gives a {type(backbone).__name__}; return a "
            "ca2cl.models.backbone.Backbone whose stem is a ca2cl.models.perturbed_conv.Stem"
        )
    backbone.arch = arch
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


def outline(arch: str, norm: Norm = "sync", *, image_size: int = 224) -> Backbone:
    """A backbone of the shape of ``build_encoder``'s, made quickly: on the meta device, where its builder can do that.
    Nothing is drawn from the caller's generator.

    Raises:
        InputError: see ``build_encoder``.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return build_encoder(arch, norm, image_size=image_size)
        except (RuntimeError, NotImplementedError):  # a builder that reads numbers of its tensors
            return build_encoder(arch, norm, image_size=image_size)


def has_batch_norm(backbone: nn.Module) -> bool:
    """Whether ``model.norm`` changes anything."""
    return any(isinstance(layer, BatchNorm) for layer in backbone.modules())
