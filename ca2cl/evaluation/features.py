"""Extract frozen features, decoding every tile once for all encoders."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ca2cl.common.console.progress import ProgressBar
from ca2cl.common.redact import redact
from ca2cl.config import Pooled
from ca2cl.data.fingerprints.seen import Fingerprints, fingerprints_of
from ca2cl.data.fingerprints.survey import digest_of
from ca2cl.data.fingerprints.thumbnails import thumbnails
from ca2cl.errors import InputError
from ca2cl.models.backbone import Backbone
from ca2cl.models.preprocess import preprocess

logger = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.floating[Any]]
Extractor = Callable[[Tensor], Tensor | Mapping[str, Tensor]]
"""uint8 tiles (B, H, W, 3) on the device → float features (B, D), or several of one pass by their names."""
Batches = Iterable[tuple[Tensor, Tensor, Tensor]]
"""uint8 tiles (B, H, W, 3), labels (B,), sample numbers (B,)."""


@dataclass(frozen=True)
class Features:
    """Features of one set of tiles.

    ``values[name]`` is float32 (N, D); ``labels_N`` and ``samples_N`` are int64; ``pixels_N`` holds a 16-byte digest of
    every tile's pixels, by which the same tile is found again under another name; ``fingerprints_ND`` find its altered
    copies.
    """

    values: dict[str, npt.NDArray[np.float32]]
    labels_N: npt.NDArray[np.int64]
    samples_N: npt.NDArray[np.int64]
    pixels_N: list[bytes]
    fingerprints_ND: Fingerprints | None = None

    def __len__(self) -> int:
        return len(self.labels_N)


def frozen(
    encoder: Backbone, size: int, mean: tuple[float, ...], std: tuple[float, ...],
    named: Mapping[str, Pooled] | None = None,
) -> Extractor:  # fmt: skip
    """The encoder behind the preprocessing that its card states. Puts the encoder in ``eval()`` mode, for good.

    Args:
        encoder: put in ``eval()`` mode, for good.
        size: side of its input in pixels.
        mean: of the input's channels, in [0, 1].
        std: of the channels.
        named: pooling of the tokens by the name of the features; none gives the encoder's own alone.
    """
    encoder.eval()
    encoder.to(memory_format=torch.channels_last)

    def extract_batch(tiles_BHWC: Tensor) -> Tensor | Mapping[str, Tensor]:
        x_BCHW = preprocess(tiles_BHWC, size, mean, std)
        if not named:
            features: Tensor = encoder(x_BCHW)
            return features
        pooled = encoder.encode(x_BCHW, named.values()).pooled
        return {name: pooled[way] for name, way in named.items()}

    return extract_batch


def colour_histogram(tiles_BHWC: Tensor, bins: int = 32) -> Tensor:
    """Share of a tile's pixels in each of ``bins`` equal ranges of red, then of green, then of blue.

    Args:
        tiles_BHWC: uint8, shape (B, H, W, 3).
        bins: a divisor of 256.

    Returns:
        float32, shape (B, 3 * bins); each third of a row sums to 1.
    """
    assert tiles_BHWC.dtype == torch.uint8 and 256 % bins == 0
    batch, height, width, channels = tiles_BHWC.shape
    # One bincount for the whole batch: every (tile, channel) pair gets its own range of bins. In place and in int32:
    # the numbers fit, and memory traffic is what this costs.
    offset_BC = torch.arange(batch * channels, dtype=torch.int32, device=tiles_BHWC.device) * bins
    bin_BHWC = (tiles_BHWC // (256 // bins)).int().add_(offset_BC.view(batch, 1, 1, channels))
    counts = torch.bincount(bin_BHWC.flatten(), minlength=batch * channels * bins)
    return (counts.view(batch, channels * bins) / (height * width)).float()


def extract(
    batches: Batches, extractors: Mapping[str, Extractor], *, total: int, device: torch.device, title: str
) -> Features:
    """Run every extractor over every batch once, in ``inference_mode``.

    Args:
        batches: what ``ca2cl.data.loading.sequential.iterate_tiles`` yields.
        total: number of tiles asked for; fewer may come where some do not decode.
        title: of the progress bar and the log line.

    Raises:
        InputError: no tile came, or a feature is not finite.
    """
    values: dict[str, list[Tensor]] = {}
    labels: list[Tensor] = []
    samples: list[Tensor] = []
    pixels: list[bytes] = []
    prints: list[Fingerprints] = []
    started = time.monotonic()
    title = redact(title)
    with torch.inference_mode(), ProgressBar(total=total, desc=title, unit="tile") as bar:
        for tiles_BHWC, labels_B, samples_B in batches:
            pixels.extend(pixel_digests(tiles_BHWC))
            on_device = tiles_BHWC.to(device, non_blocking=True)
            prints.append(fingerprints_of(thumbnails(on_device)))
            for name, extractor in extractors.items():
                made = extractor(on_device)
                for key, features in made.items() if isinstance(made, Mapping) else [(name, made)]:
                    # a class token is a view, and on a CPU would keep the tokens of all tiles in memory
                    values.setdefault(key, []).append(features.float().cpu().clone())
            labels.append(labels_B.cpu().long())
            samples.append(samples_B.cpu().long())
            bar.update(len(tiles_BHWC))
    if not labels:
        raise InputError(f"{title}: none of {total} tiles could be decoded; check the shards with `ca2cl doctor`")
    logger.info("%s: %d of %d tiles in %.1f s", title, len(pixels), total, time.monotonic() - started)
    arrays = {name: torch.cat(parts).numpy() for name, parts in values.items()}
    _check_finite(arrays, title)
    return Features(arrays, torch.cat(labels).numpy(), torch.cat(samples).numpy(), pixels, np.concatenate(prints))


def centred(train_ND: FloatArray, *others: FloatArray) -> list[FloatArray]:
    """All of them less the mean of ``train_ND``, of unit length: what all tiles share makes every cosine close to 1."""
    mean_D = mean_of(train_ND)
    return [scaled(features, mean_D) for features in (train_ND, *others)]


def mean_of(features_ND: FloatArray) -> FloatArray:
    """Mean (D,) over the tiles, in the features' type."""
    return np.asarray(features_ND.mean(axis=0, dtype=np.float64).astype(features_ND.dtype))


def scaled(features_ND: FloatArray, mean_D: FloatArray) -> FloatArray:
    """Features less a mean, of unit length; one that equals the mean is zero."""
    features = features_ND - mean_D
    norm = np.linalg.norm(features, axis=1, keepdims=True)
    return np.asarray(features / np.maximum(norm, np.finfo(features.dtype).tiny), features.dtype)


def pixel_digests(tiles_BHWC: Tensor) -> list[bytes]:
    """16 bytes for every tile, by which the same pixels are found again."""
    return [digest_of(tile) for tile in tiles_BHWC.cpu().numpy()]


def _check_finite(arrays: Mapping[str, npt.NDArray[np.float32]], title: str) -> None:
    for name, values_ND in arrays.items():
        broken = int((~np.isfinite(values_ND)).any(axis=1).sum())
        if broken:
            raise InputError(
                f"{title}: {name} gives features that are not finite for {broken} tiles; use an encoder that converged"
            )
