"""Feature pyramids on a detector's body.

Shapes: B images of H x W pixels, C channels of a body's map, h x w its positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from ca2cl.detection.network.body import STRIDES, pyramid_levels, pyramid_maps
from ca2cl.models.backbone import Backbone, has_batch_norm
from ca2cl.models.batch_norm import BatchNorm, Norm
from ca2cl.models.features import Level

CHANNELS = 256
"""Of every level of a pyramid (Lin et al., arXiv 1612.03144, section 3)."""
_NORM = partial(LayerNorm2d, eps=1e-6)


class SimplePyramid(nn.Module):
    """Levels of several strides from one map (Li et al., arXiv 2203.16527, section 3 and appendix A.2).

    Each is made from the map itself: transposed convolutions of stride 2, which halve the channels, or max pooling;
    then a 1 x 1 and a 3 x 3 convolution to ``CHANNELS``. LayerNorm over channels follows every convolution.

    Args:
        level: of the map.
        strides: of the levels to make, powers of two.
        extra: coarser levels from the last ones, as torchvision's pyramid takes it.
    """

    def __init__(self, level: Level, strides: Sequence[int], extra: ExtraFPNBlock) -> None:
        super().__init__()
        self.scales = nn.ModuleList(_scale(level, stride) for stride in strides)
        for module in self.scales.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
        self.extra_blocks = extra

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        """Levels by name, from fine to coarse, of one map (B, C, h, w)."""
        (map_BChw,) = maps.values()
        results = [scale(map_BChw) for scale in self.scales]
        results, names = self.extra_blocks(results, [map_BChw], [str(number) for number in range(len(results))])
        return dict(zip(names, results, strict=True))


def _scale(level: Level, stride: int) -> nn.Sequential:
    channels, layers = level.channels, list[nn.Module]()
    for number in range(int(math.log2(level.stride / stride))):
        layers += [_NORM(channels), nn.GELU()] if number else []
        layers.append(nn.ConvTranspose2d(channels, channels // 2, 2, stride=2))
        channels //= 2
    if stride > level.stride:
        layers.append(nn.MaxPool2d(stride // level.stride))
    convolution = partial(Conv2dNormActivation, norm_layer=_NORM, activation_layer=None)
    return nn.Sequential(*layers, convolution(channels, CHANNELS, 1), convolution(CHANNELS, CHANNELS, 3))


class Pyramid(nn.Module):
    """A body with a feature pyramid: what torchvision's detectors take as a backbone.

    Four maps go into a feature pyramid network, a single one into ``SimplePyramid``. A body without BatchNorm has
    LayerNorm over channels in front of the network and in it, as Swin's and ConvNeXt's authors detect.

    Attributes:
        body: the encoder.
        fpn: the pyramid.
        out_channels: of every level.
    """

    out_channels = CHANNELS

    def __init__(self, body: Backbone, finest: int, extra: ExtraFPNBlock, norm: Norm) -> None:
        """A new pyramid on ``body``.

        Args:
            finest: stride of its finest level, 4 or 8.
            extra: coarser levels than stride 32.
            norm: of the network beside a body with BatchNorm; with frozen it has none, for a new one has no statistics.

        Raises:
            InputError: no pyramid can be built on this body.
        """
        super().__init__()
        self.body = body
        levels, strides = pyramid_levels(body), [stride for stride in STRIDES if stride >= finest]
        self.fpn: nn.Module
        if len(levels) == 1:
            self.fpn = SimplePyramid(levels[0], strides, extra)
            self._first, channels = 0, list[int]()
        else:
            batch_norm = has_batch_norm(body)
            new = partial(BatchNorm, norm=norm) if norm != "frozen" else None
            self._first = STRIDES.index(finest)
            channels = [level.channels for level in levels[self._first :]]
            self.fpn = FeaturePyramidNetwork(channels, CHANNELS, extra, new if batch_norm else _NORM)
            channels = [] if batch_norm else channels
        self.norms = nn.ModuleList(_NORM(number) for number in channels)

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Levels (B, out_channels, H / stride, W / stride) by name, from fine to coarse, of normalised images whose
        sides are multiples of 32."""
        maps = pyramid_maps(self.body, images_BCHW)[self._first :]
        if self.norms:
            maps = [norm(one) for norm, one in zip(self.norms, maps, strict=True)]
        found: dict[str, Tensor] = self.fpn({str(number): one for number, one in enumerate(maps)})
        return found
