"""Settings of ``ca2cl export``."""

from __future__ import annotations

from dataclasses import dataclass, field

from ca2cl.config import TrackingConfig
from ca2cl.errors import InputError, nearest
from ca2cl.export.targets import TARGETS

POSITIONAL = ("out",)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write an encoder as a file that another program loads.

    The file is read back by that program's own means, where it is installed, and takes its place only when its features
    are the encoder's (to 1e-5 of the largest; ONNX to 1e-4). Three lines that load it are printed at the end.
    """

    encoder: str
    """Run id or its first digits, version number, alias (champion, latest), models:/NAME/VERSION, run folder,
    .safetensors file, torchvision:IMAGENET1K_V1 or random."""
    to: str
    """torchvision: state dict of a ResNet without fc (.pth). timm: a ResNet or one of timm's bodies for
    create_model(checkpoint_path=...) (.safetensors or .pth). detectron2: a ResNet for DetectionCheckpointer (.pth, and
    a .yaml of the settings that belong to it). onnx: RGB in [0, 1] to features with the normalisation inside, for any
    number of tiles of the encoder's size (.onnx). safetensors: a folder with encoder.safetensors and card.json, which
    every verb takes as its encoder. All but the last two leave the normalisation to you: its mean and std are
    printed."""
    out: str
    """The file to write, with the suffix of its kind; for safetensors the folder."""
    overwrite: bool = False
    """Replace what is there."""
    arch: str | None = None
    """Architecture of weights that come without a card, as model.arch. None takes resnet18."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the encoder is found."""

    def __post_init__(self) -> None:
        if self.to not in TARGETS:
            raise InputError(f"to is {self.to!r}: {nearest(self.to.lower(), [*TARGETS])}")
