"""A method's frozen teacher: found, prepared, and its features cached.

Legend: B rows of a micro-batch, S side of the student's view in pixels, E features of the teacher, N tiles.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ca2cl.common.plugins import is_plugin
from ca2cl.common.records import parse_json
from ca2cl.config import TrackingConfig
from ca2cl.data.fingerprints.seen import Seen
from ca2cl.data.shards.index import ShardIndex, key_hash
from ca2cl.errors import InputError
from ca2cl.evaluation.embed.config import EmbedConfig
from ca2cl.evaluation.embed.run import run as embed
from ca2cl.evaluation.embed.writer import keys_path, open_vectors, read_about
from ca2cl.methods.base import Method, Teacher, TeacherSource, Tiles
from ca2cl.models.backbone import check_trusted
from ca2cl.models.encoder_io import weights_digest
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.pretrain.memory.check import check_teacher
from ca2cl.pretrain.memory.held import weights_bytes
from ca2cl.registry.resolve import ResolvedEncoder, resolve_encoder
from ca2cl.runtime.device import to_device
from ca2cl.runtime.distributed import Ranks
from ca2cl.runtime.precision import HALF

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundTeacher:
    """A teacher that is ready for the method.

    Attributes:
        teacher: for ``Method.take_teacher``.
        uri: what it was found as.
        identity: digest of its weights and normalisation, and its input size: a run goes on with the same alone.
        manifests: tiles that its weights were trained on.
        seen: digests of these, where they were kept.
    """

    teacher: Teacher
    uri: str
    identity: str
    manifests: tuple[str, ...]
    seen: Seen | None = None

    def pass_bytes(self, image_size: int, view_dtype: torch.dtype) -> float:
        """Bytes that a pass of views holds for each tile.

        Args:
            image_size: side of the views in pixels.
            view_dtype: of the views.
        """
        from ca2cl.pretrain.memory.dry_step import teacher_bytes  # not every job needs torch's fake tensors

        if not isinstance(self.teacher, LiveTeacher):
            return 0.0
        return teacher_bytes(self.teacher, image_size, view_dtype, self.teacher.device)


def find_teacher(
    config: PretrainConfig,
    method: Method,
    device: torch.device,
    index: ShardIndex,
    ranks: Ranks,
    unit: int | None = None,
) -> FoundTeacher | None:
    """Find the encoder of ``method.teacher_source`` and hand it to the method; None for a method without one.

    Args:
        config: the job's.
        method: it takes the teacher.
        device: where the teacher computes.
        index: of the tiles that a cache holds features of.
        ranks: of the job; all call it.
        unit: rows that pass through the teacher at a time, for results that do not depend on micro-batches; None: all.

    Raises:
        InputError: no teacher is named, it cannot be found, or its cache cannot be written.
    """
    source = method.teacher_source
    if source is None:
        return None
    found = ranks.together(lambda: resolve_teacher(config, source))
    card, encoder = found.card, found.encoder
    size = source.image_size or card.input_size
    digest = weights_digest(encoder, card.mean, card.std)
    ranks.together(lambda: _try(encoder, size))
    encoder.requires_grad_(False)
    if ranks.rank == 0:
        logger.info(
            "teacher: %s, a %s of %d features, %s; it sees %s of %d px", found.uri, card.arch, card.feature_dim,
            digest[:12], "unaugmented tiles" if source.cache else "the student's views", size,
        )  # fmt: skip
    teacher: Teacher
    if source.cache:
        teacher = _cached(config, source, found, f"{digest[:16]}-{index.manifest.digest[:16]}-{size}", device, ranks)
    else:
        if device.type != "cpu":
            ranks.together(lambda: check_teacher(weights_bytes(encoder), device))
        teacher = live_teacher(config, source, found, device, unit)
    method.take_teacher(teacher)
    return FoundTeacher(teacher, found.uri, f"{digest} at {size} px", card.manifests, found.seen)


def live_teacher(
    config: PretrainConfig, source: TeacherSource, found: ResolvedEncoder, device: torch.device, unit: int | None = None
) -> LiveTeacher:
    """The teacher that sees the student's views.

    Args:
        config: the job's.
        source: names the teacher.
        found: what it names.
        device: where it computes; the encoder is moved there.
        unit: as of ``LiveTeacher``.
    """
    card, model = found.card, config.model
    return LiveTeacher(
        found.encoder.to(device, memory_format=torch.channels_last),  # type: ignore[call-overload]
        card.feature_dim, source.image_size or card.input_size, model.normalisation, (card.mean, card.std),
        HALF.get(config.run.precision), unit,
    )  # fmt: skip


def resolve_teacher(config: PretrainConfig, source: TeacherSource) -> ResolvedEncoder:
    """The teacher's encoder in eval mode on the CPU, and its card.

    Raises:
        InputError: none is named, or it cannot be found.
    """
    if not source.encoder:
        raise InputError(
            f"method.options has no teacher: {config.method.name} needs an encoder, --method.options teacher=ENCODER "
            "(any form that model.weights takes)"
        )
    if is_plugin(source.arch):  # options may come from a file
        check_trusted(source.arch, "method.options teacher_arch")
    return resolve_encoder(
        source.encoder, tracking_uri=config.tracking.uri, root=config.tracking.root, arch=source.arch or None
    )


def _try(encoder: nn.Module, size: int) -> None:
    """Refuse an input size that the encoder cannot take, before the job starts."""
    with torch.inference_mode():
        encoder(torch.zeros(1, 3, size, size))


class LiveTeacher:
    """Features of the views that the student sees, computed as they are needed (``methods.base.Teacher``).

    Args:
        encoder: in eval mode, on the device.
        feature_dim: E.
        size: side of its input; views of another one are resized as ``models.preprocess`` does.
        student: mean and standard deviation by which the views are normalised.
        teacher: those of the encoder.
        autocast_dtype: precision of its passes; None: fp32.
        unit: rows of a pass; None: all.
    """

    def __init__(
        self,
        encoder: nn.Module,
        feature_dim: int,
        size: int,
        student: tuple[Sequence[float], Sequence[float]],
        teacher: tuple[Sequence[float], Sequence[float]],
        autocast_dtype: torch.dtype | None = None,
        unit: int | None = None,
    ) -> None:
        self.encoder, self._dim, self._size = encoder, feature_dim, size
        self._dtype, self._unit = autocast_dtype, unit
        (mean, std), (own_mean, own_std) = ([torch.tensor(x).double() for x in pair] for pair in (student, teacher))
        device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
        factors = torch.stack([std / own_std, (mean - own_mean) / own_std]).float().view(2, 1, 3, 1, 1)
        self._scale, self._shift = factors.to(device)
        self.device = device

    @property
    def feature_dim(self) -> int:
        """E."""
        return self._dim

    def known(self, tiles: Tiles) -> None:
        """Nothing: features depend on the view."""

    @torch.no_grad()
    def __call__(self, x_BCHW: Tensor) -> Tensor:
        """Unit vectors (B, E) in fp32 of views (B, 3, S, S)."""
        parts = [self._features(rows) for rows in torch.split(x_BCHW, self._unit or len(x_BCHW))]
        return F.normalize(torch.cat(parts).float(), dim=1)

    def _features(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = x_BCHW.float() * self._scale + self._shift
        if x_BCHW.shape[-1] != self._size:
            size = (self._size, self._size)
            x_BCHW = F.interpolate(x_BCHW, size, mode="bilinear", align_corners=False, antialias=True)
        with torch.autocast(x_BCHW.device.type, self._dtype, enabled=self._dtype is not None):
            features: Tensor = self.encoder(x_BCHW.contiguous(memory_format=torch.channels_last))
        return features


class CachedTeacher:
    """Features of the unaugmented tiles, read from a file of ``ca2cl embed`` (``methods.base.Teacher``).

    Args:
        path: NAME.safetensors, with NAME.keys.jsonl beside it. The vectors are mapped, not read.
        device: where features go.

    Raises:
        InputError: the file is damaged.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self._path, self._device = path, device
        self._vectors_NE = open_vectors(path)
        words_N = _words(keys_path(path))
        self._row_N: npt.NDArray[np.int64] = np.argsort(words_N, kind="stable")
        self._word_N = words_N[self._row_N]
        if len(words_N) != len(self._vectors_NE) or (self._word_N[1:] == self._word_N[:-1]).any():
            raise InputError(f"{keys_path(path)}: does not belong to {path.name}; remove both, and start again")

    @property
    def feature_dim(self) -> int:
        """E."""
        return int(self._vectors_NE.shape[1])

    def known(self, tiles: Tiles) -> Tensor:
        """Unit vectors (B, E) in fp32, on the device."""
        words_B = tiles.keys.cpu().numpy()
        places_B = np.searchsorted(self._word_N, words_B).clip(max=len(self._word_N) - 1)
        if (self._word_N[places_B] != words_B).any():
            raise InputError(f"{self._path}: holds no features of some tile of data.shards; remove it, and start again")
        found = torch.from_numpy(self._vectors_NE[self._row_N[places_B]])
        return to_device(F.normalize(found, dim=1), self._device)

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        """Never called: all features are known."""
        raise AssertionError("a cached teacher sees no views")


def _words(path: Path) -> npt.NDArray[np.int64]:
    """The word of every tile's key, which is what a batch has of it."""
    try:
        with path.open(encoding="utf-8") as file:
            return np.array([key_hash(parse_json(line)["key"]) for line in file], np.int64)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); remove it, and start again") from None


def _cached(
    config: PretrainConfig, source: TeacherSource, found: ResolvedEncoder, name: str, device: torch.device, ranks: Ranks
) -> CachedTeacher:
    """The cache of ``found``, computed if it is not there: the ranks share the work, and a killed job goes on."""
    path = Path(source.cache) / f"{name}.safetensors"
    if not ranks.from_first(lambda: _is_of(read_about(path) if keys_path(path).exists() else None, name)):
        data, size = config.data, source.image_size or found.card.input_size
        settings = EmbedConfig(
            encoder=source.encoder, source=data.shards, out=str(path), image_size=size, device=str(device),
            precision=config.run.precision, workers=data.workers, cache_dir=data.cache_dir, unlabelled=True,
            overwrite=True, max_bad_rate=data.max_bad_rate,
            tracking=TrackingConfig(uri=config.tracking.uri, root=config.tracking.root),
        )  # fmt: skip
        ranks.together(lambda: path.parent.mkdir(parents=True, exist_ok=True))
        embed(settings, found)
        ranks.share(None)  # the first rank puts the parts together after the others have made theirs
    return ranks.together(lambda: CachedTeacher(path, device))


def _is_of(about: Mapping[str, Any] | None, name: str) -> bool:
    """Whether a file of vectors is the cache of that name."""
    identity = about.get("identity", {}) if about else {}
    parts = [str(identity.get("encoder"))[:16], str(identity.get("data"))[:16], str(identity.get("image_size"))]
    return "-".join(parts) == name
