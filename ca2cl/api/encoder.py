"""``load_encoder``: a torch module and the transform of its tiles."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ca2cl.models.encoder_io import EncoderCard
from ca2cl.models.preprocess import preprocess
from ca2cl.registry.resolve import ResolvedEncoder, resolve_encoder
from ca2cl.runtime.device import find_device
from ca2cl.store.locate import user_place


class Transform:
    """Resize, scale and normalise tiles as the encoder saw them in training: uint8 [0, 255] to float32 (3, S, S).

    The result is that of ``ca2cl probe``, ``embed`` and the served model. It may be given to any torch dataset as its
    ``transform``, also with worker processes.

    Attributes:
        size: side S of the result in pixels.
        mean: of the channels, in [0, 1]; subtracted.
        std: of the channels; divides.
    """

    def __init__(self, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.size, self.mean, self.std = size, mean, std

    def __call__(self, tiles: Any) -> Tensor:
        """One tile as float32 (3, S, S), or a batch as (B, 3, S, S), on the tiles' device.

        Args:
            tiles: a PIL image; or uint8 RGB in [0, 255] as NumPy array or tensor, (H, W, 3) or (3, H, W), or a batch
                of these, (B, H, W, 3) or (B, 3, H, W).

        Raises:
            ValueError: another dtype or shape.
        """
        pixels = as_pixels(tiles)
        single = pixels.ndim == 3
        made = preprocess(pixels[None] if single else pixels, self.size, self.mean, self.std)
        return made[0] if single else made

    def __repr__(self) -> str:
        return f"Transform(size={self.size}, mean={self.mean}, std={self.std})"


def as_pixels(tiles: Any) -> Tensor:
    """Tiles as uint8 (H, W, 3) or (B, H, W, 3), whatever of the forms of ``Transform`` they have.

    Raises:
        ValueError: another dtype or shape.
    """
    if hasattr(tiles, "convert"):  # PIL
        tiles = np.array(tiles.convert("RGB"))
    pixels = torch.as_tensor(tiles)
    if pixels.dtype == torch.uint8 and pixels.ndim in (3, 4):
        if pixels.shape[-1] == 3:
            return pixels
        if pixels.shape[-3] == 3:
            return pixels.movedim(-3, -1)
    raise ValueError(
        f"tiles are {pixels.dtype} {tuple(pixels.shape)}: give a PIL image, or uint8 RGB of shape (H, W, 3), "
        "(3, H, W), (B, H, W, 3) or (B, 3, H, W)"
    )


class Encoder(nn.Module):
    """A trained encoder: normalised tiles to features.

    A plain torch module: train it further, put it on a device, give it to ``DistributedDataParallel``. ``load_encoder``
    makes it. It maps float tiles (B, 3, S, S), which ``transform`` makes of uint8 RGB in [0, 255], to features (B, D).

    Attributes:
        backbone: the network, whose tensors have torchvision's or timm's names.
        transform: makes its input of tiles.
        card: architecture, input size, normalisation and origin.
        feature_dim: number D of features.
        classes: of the linear head, where the encoder is a fine-tuned classifier; otherwise empty.
        head: that layer, or None.
        run_id: MLflow run that made it, as far as known.
        uri: name of what was loaded: a version's number in place of its alias.
    """

    def __init__(self, found: ResolvedEncoder) -> None:
        super().__init__()
        card = found.card
        self.backbone = found.encoder
        self.transform = Transform(card.input_size, card.mean, card.std)
        self.card: EncoderCard = card
        self.feature_dim: int = card.feature_dim
        self.classes: tuple[str, ...] = card.predicts if found.head is not None else ()
        self.head: nn.Linear | None = None
        self.run_id, self.uri = found.source_run_id, found.uri
        if found.head is not None:
            self.head = nn.Linear(card.feature_dim, len(card.predicts))
            self.head.load_state_dict(found.head._asdict())
        self.eval()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Features (B, D), in the dtype of the input and without bounds.

        Args:
            x_BCHW: normalised float tiles (B, 3, S, S), as ``transform`` makes them, on the device of the weights.
                ResNets take other sizes, too.

        Raises:
            RuntimeError: of torch: another shape, or a dtype or device other than that of the weights.
        """
        features: Tensor = self.backbone(x_BCHW)
        return features

    def predict(self, x_BCHW: Tensor) -> Tensor:
        """Probabilities (B, K) of ``classes``, in [0, 1]; each row adds up to 1.

        Args:
            x_BCHW: as for the call.

        Raises:
            ValueError: the encoder has no head.
        """
        if self.head is None:
            raise ValueError(f"{self.uri}: has no classifier; load one that `ca2cl finetune` registered")
        logits: Tensor = self.head(self(x_BCHW))
        return logits.softmax(1)

    def patch_tokens(self, x_BCHW: Tensor) -> Tensor:
        """Features of the patches (B, h, w, C): a ViT's patch tokens, or a ResNet's last map.

        Args:
            x_BCHW: as for the call.
        """
        return self.backbone.tokens(x_BCHW).patches

    def extra_repr(self) -> str:
        return f"uri={self.uri!r}, feature_dim={self.feature_dim}"


def load_encoder(
    source: str | Path,
    *,
    tracking_uri: str | None = None,
    root: str | Path | None = None,
    arch: str | None = None,
    device: str = "cpu",
) -> Encoder:
    """Load an encoder as a torch module in ``eval()`` mode, with the transform of its tiles.

    ``encoder.transform`` takes uint8 RGB tiles in [0, 255], (H, W, 3) or (B, H, W, 3), or a PIL image, and gives
    normalised float32 (3, S, S) or (B, 3, S, S). ``encoder(x)`` takes those (B, 3, S, S) and gives features (B, D) of
    the same dtype. S is ``encoder.card.input_size`` and D ``encoder.feature_dim``.

    Args:
        source: what ``--encoder`` takes: a run id or its first digits, ``models:/NAME/VERSION``,
            ``models:/NAME@ALIAS``, a version's number or alias (``champion``, ``latest``), a run folder, a file of
            weights, ``timm:NAME.TAG``, ``hf-hub:ORG/NAME``, ``torchvision:IMAGENET1K_V1`` or ``random``.
        tracking_uri: MLflow store; None takes MLFLOW_TRACKING_URI, or the embedded store in ``root``.
        root: folder of the embedded store; None takes the user's configuration, or ``ca2cl-runs``
            in the working directory.
        arch: architecture of weights that come without a card; None takes the card's, or resnet18.
        device: ``cpu``, ``cuda``, ``cuda:N``, or ``auto`` for a GPU where there is one.

    Raises:
        ca2cl.errors.InputError: a ``ValueError`` of one line: nothing of that name, a store that cannot be reached,
            weights that do not fit the architecture, or a device that is not there.

    Example:
        >>> encoder = ca2cl.load_encoder("models:/ca2cl-encoder@champion")
        >>> with torch.inference_mode():
        ...     features = encoder(encoder.transform(PIL.Image.open("tile.png"))[None])
    """
    if tracking_uri is None and root is None and not os.environ.get("MLFLOW_TRACKING_URI"):
        tracking_uri, root = user_place() or (None, None)
    found = resolve_encoder(str(source), tracking_uri=tracking_uri, root=root, arch=arch)
    return Encoder(found).to(find_device(device))
