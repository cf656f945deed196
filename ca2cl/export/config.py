"""Settings of ``ca2cl export``."""

from __future__ import annotations

from dataclasses import dataclass, field

from ca2cl.config import TrackingConfig
from ca2cl.errors import InputError, nearest

POSITIONAL = ("out",)
FORMATS = ("torchvision", "timm", "detectron2", "onnx", "safetensors")
"""Names in ``export.targets``, which imports torch; printing the help should not."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write an encoder as a file for another program.

    If that program is installed, it loads the file before the file is put in place. Its features must equal the
    encoder's (to 1e-5 of the largest; ONNX to 1e-4). Three lines of Python that load the file are printed at the end.
    """

    encoder: str
    """Run id or its first digits, version number, alias (champion, latest), models:/NAME/VERSION, run folder,
    .safetensors file, timm:NAME.TAG, hf-hub:ORG/NAME, torchvision:IMAGENET1K_V1 or random."""
    to: str
    """torchvision: state dict of a ResNet without fc (.pth). timm: a ResNet or a timm model for
    create_model(checkpoint_path=...) (.safetensors or .pth). detectron2: a ResNet for DetectionCheckpointer (.pth, and
    a .yaml of its settings). onnx: RGB in [0, 1] to features with the normalisation inside, for any number of tiles of
    the encoder's size (.onnx). safetensors: a folder with encoder.safetensors and card.json, which every verb takes as
    its encoder. For all but the last two you must normalise the input yourself; mean and std are printed."""
    out: str
    """File to write, with the suffix of its kind; for safetensors a folder."""
    overwrite: bool = False
    """Replace an existing file."""
    arch: str | None = None
    """Architecture, as model.arch, of weights without a card; none uses resnet18."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow store of the encoder."""

    def __post_init__(self) -> None:
        if self.to not in FORMATS:
            raise InputError(f"to is {self.to!r}: {nearest(self.to.lower(), [*FORMATS])}")
