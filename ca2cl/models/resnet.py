"""torchvision's ResNets without classifier, with a perturbable stem."""

from __future__ import annotations

from collections.abc import Iterable

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from ca2cl.config import Pooling
from ca2cl.errors import InputError
from ca2cl.models.backbone import Backbone, BackboneOptions
from ca2cl.models.batch_norm import norm_layer
from ca2cl.models.blocks.layers import Matcher
from ca2cl.models.features import Encoded, Level, Tokens
from ca2cl.models.perturbed_conv import Stem

_LAYOUTS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], list[int]]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
}
ARCHITECTURES = tuple(_LAYOUTS)


class ResNet(torchvision.models.ResNet, Backbone):  # type: ignore[misc, unused-ignore]
    """f of the method: tiles to pooled features, 512 (2,048 for resnet50).

    The state's keys are torchvision's, less ``fc``.
    """

    conv1: Stem
    bn1: nn.Module
    relu: nn.Module
    maxpool: nn.Module
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module
    avgpool: nn.Module
    fc: nn.Module

    def __init__(self, arch: str, options: BackboneOptions) -> None:
        block, layers = _LAYOUTS[arch]
        super().__init__(block, layers, norm_layer=norm_layer(options.norm, options.group))
        self.conv1 = Stem.of(self.conv1)
        self.arch = arch
        if options.pooling == "mean":  # which is its own
            self.pooling = options.pooling
        self.feature_dim = 512 * block.expansion
        self.fc = nn.Identity()

    @property
    def stem(self) -> Stem:  # type: ignore[override]
        """The first convolution, 7 x 7."""
        return self.conv1

    def group_matcher(self, coarse: bool = False) -> Matcher:
        """As ``Backbone.group_matcher``; a layer is a residual block or, ``coarse``, one of layer1 to layer4."""
        return {"stem": r"^conv1|bn1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def forward(self, x_BCHW: Tensor, stem_delta: Tensor | None = None) -> Tensor:
        """Features h (B, feature_dim); see ``Backbone``."""
        features: Tensor = self.avgpool(self._map(x_BCHW, stem_delta)).flatten(1)
        return features

    def tokens(self, x_BCHW: Tensor, stem_delta: Tensor | None = None) -> Tokens:
        """The last map as patches; see ``Backbone``."""
        return _by_position(self._map(x_BCHW, stem_delta))

    def encode(self, x_BCHW: Tensor, poolings: Iterable[Pooling] = ("default",)) -> Encoded:
        """As ``Backbone.encode``, in one pass."""
        map_BDhw = self._map(x_BCHW, None)
        return Encoded({way: self.avgpool(map_BDhw).flatten(1) for way in poolings}, _by_position(map_BDhw))

    @property
    def levels(self) -> tuple[Level, ...]:
        """One for each of layer1 to layer4; see ``Backbone``."""
        return tuple(Level(self.feature_dim >> (3 - number), 4 << number) for number in range(4))

    def maps(self, x_BCHW: Tensor) -> list[Tensor]:
        """Outputs of layer1 to layer4; see ``Backbone``."""
        x, found = self._stem_map(x_BCHW, None), []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            found.append(x)
        return found

    def _map(self, x_BCHW: Tensor, stem_delta: Tensor | None) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self._stem_map(x_BCHW, stem_delta)))))
        assert isinstance(x, Tensor)
        return x

    def _stem_map(self, x_BCHW: Tensor, stem_delta: Tensor | None) -> Tensor:
        x: Tensor = self.maxpool(self.relu(self.bn1(self.conv1(x_BCHW, stem_delta))))
        return x


def _by_position(map_BDhw: Tensor) -> Tokens:
    patches_BhwD = map_BDhw.permute(0, 2, 3, 1)
    return Tokens(patches_BhwD.new_zeros(len(map_BDhw), 0, patches_BhwD.shape[-1]), patches_BhwD)


def build(arch: str, options: BackboneOptions) -> ResNet:
    """A ResNet with torchvision's initialisation.

    ``identity_blocks`` sets the weight of every residual block's last BatchNorm to 0 (Goyal et al., 2017, section 5.1).
    Without it the embeddings of a new network nearly coincide, what tells them apart is rounding, and so are then the
    first steps.
    """
    encoder = ResNet(arch, options)
    if options.identity_blocks:
        for block in encoder.modules():
            if isinstance(block, (BasicBlock, Bottleneck)):
                last = block.bn2 if isinstance(block, BasicBlock) else block.bn3
                nn.init.zeros_(last.weight)
    return encoder


def require_resnet(arch: str, what: str) -> None:
    """Refuse a body that ``what`` cannot use.

    Raises:
        InputError: not one of ``ARCHITECTURES``.
    """
    if arch not in ARCHITECTURES:
        raise InputError(f"{what} is not for {arch}, only for {', '.join(ARCHITECTURES)}; give such an encoder")
