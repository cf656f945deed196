"""The encoder: a torchvision ResNet without its classifier, whose stem takes a perturbation as an input."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from ca2cl.errors import InputError
from ca2cl.models.batch_norm import Norm, norm_layer
from ca2cl.models.perturbed_conv import Stem

_LAYOUTS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], list[int]]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
}
ARCHITECTURES = tuple(_LAYOUTS)


class Encoder(ResNet):
    """f of the method: tiles to pooled features.

    The state's keys are torchvision's, less ``fc``.

    Attributes:
        arch: name of the architecture.
        feature_dim: length of a feature vector (512, or 2,048 for resnet50).
    """

    def __init__(self, arch: str = "resnet18", norm: Norm = "sync", group: int = 16) -> None:
        if arch not in _LAYOUTS:
            raise InputError(f"model.arch is {arch!r}: use one of {', '.join(ARCHITECTURES)}")
        block, layers = _LAYOUTS[arch]
        super().__init__(block, layers, norm_layer=norm_layer(norm, group))
        self.conv1: Stem = Stem.of(self.conv1)
        self.arch = arch
        self.feature_dim = 512 * block.expansion
        self.fc: nn.Module = nn.Identity()

    def forward(self, x_BCHW: Tensor, stem_delta: Tensor | None = None) -> Tensor:
        """Features h (B, feature_dim) of normalised tiles (B, 3, H, W).

        Args:
            stem_delta: added to the stem convolution's weight for this pass, shape (64, 3, 7, 7). An input and not a
                write to the parameter, so that nothing must be restored and ZeRO cannot lose it (DeepSpeed#5667).
        """
        x = self.maxpool(self.relu(self.bn1(self.conv1(x_BCHW, stem_delta))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        features: Tensor = self.avgpool(x).flatten(1)
        return features


def build_encoder(
    arch: str = "resnet18", norm: Norm = "sync", *, group: int = 16, identity_blocks: bool = False
) -> Encoder:
    """A freshly initialised encoder (torchvision's initialisation, from torch's global generator).

    Args:
        norm: whose samples BatchNorm's statistics are taken over while training.
        group: tiles that share them, where ``norm`` is lane_group.
        identity_blocks: start every residual block as the identity, its last BatchNorm's weight 0 (Goyal et al., 2017,
            section 5.1): what training from scratch wants. Without it the embeddings of a new network nearly coincide,
            what tells them apart is rounding, and so are then the first steps.

    Raises:
        InputError: ``arch`` is not one of ``ARCHITECTURES``.
    """
    encoder = Encoder(arch, norm, group)
    if identity_blocks:
        for block in encoder.modules():
            if isinstance(block, (BasicBlock, Bottleneck)):
                last = block.bn2 if isinstance(block, BasicBlock) else block.bn3
                nn.init.zeros_(last.weight)
    return encoder
