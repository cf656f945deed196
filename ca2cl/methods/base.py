"""Interface of a self-supervised method, and of the engine under it.

A method is a subclass of ``Method``, known by its name in ``methods.registry`` or as ``package.module:Class``. Most
losses of two views are shorter as a ``methods.two_views.TwoViewMethod``, which brings exact accumulation along.

Shapes: B local rows of a micro-batch, S side of a view in pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ca2cl.config import ObjectiveConfig
from ca2cl.models.backbone import Backbone
from ca2cl.models.heads import EncoderNetwork

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Panel = tuple[str, str, tuple[tuple[str, str], ...]]
"""A chart of the run's curves: its title, its unit, and names of terms with their labels."""


class Tiles(NamedTuple):
    """A micro-batch before views are made of it.

    Attributes:
        pixels: uint8 (B, H, W, 3), on the device.
        keys: int64 (B,), a word a tile, on the host: what a view draws is drawn there.
        epoch: the pass over the data, from 0.
        positions: int64 (B,), the rows' places in the global batch.
        second_order: int64 (B,), the rows' order in which a second view's groups of ``lane_group`` normalisation are
            runs of consecutive rows (the first view's are in the order given); None: there are no groups.
        words: int64 (2, B), a word for the strong and the weak view of each row, on the device: drop path draws from
            it. None: the network has none.
        slides: int64 (B,), equal for tiles of one slide or patient, on the device. None: each tile has its own.
    """

    pixels: Tensor
    keys: Tensor
    epoch: int
    positions: Tensor
    second_order: Tensor | None = None
    words: Tensor | None = None
    slides: Tensor | None = None


class Views(Protocol):
    """Augmented views of tiles, a pure function of what it is given (``views.batch.Views``)."""

    def __call__(self, tiles_BHWC: Tensor, key_hash_B: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """The strong and the weak view, normalised, (B, 3, S, S) each."""

    def strong(self, tiles_BHWC: Tensor, key_hash_B: Tensor, epoch: int) -> Tensor:
        """The strong view alone."""

    def weak(self, tiles_BHWC: Tensor, key_hash_B: Tensor, epoch: int) -> Tensor:
        """The weak view alone."""


class ViewBatch(NamedTuple):
    """Two views of a micro-batch, (B, 3, S, S) each; the other fields are those of ``Tiles``."""

    x1: Tensor
    x2: Tensor
    positions: Tensor
    second_order: Tensor | None = None
    words: Tensor | None = None
    slides: Tensor | None = None


@dataclass(frozen=True)
class TeacherSource:
    """A frozen encoder that a method needs, as ``pretrain.teacher`` finds it.

    Attributes:
        encoder: as ``model.weights`` names one.
        arch: its architecture, where its weights come without a card; empty otherwise.
        image_size: side in pixels of its input; 0: that of its card.
        cache: folder in which its features of unaugmented tiles are kept; empty: it sees the student's view.
    """

    encoder: str
    arch: str = ""
    image_size: int = 0
    cache: str = ""


class Teacher(Protocol):
    """A frozen encoder, outside of the network that is trained: no engine, optimizer or checkpoint holds it."""

    @property
    def feature_dim(self) -> int:
        """Length of its feature vectors."""

    def known(self, tiles: Tiles) -> Tensor | None:
        """Features (B, E) of the unaugmented tiles, where they are cached: unit vectors in fp32, on the device."""

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        """Features (B, E) of views that are normalised for the student: unit vectors in fp32, without graph."""


class Engine(Protocol):
    """The interface through which a method computes and exchanges gradients."""

    @property
    def network(self) -> nn.Module:
        """The wrapped network: call it like what ``Method.build`` made."""

    @property
    def bare(self) -> Any:
        """The unwrapped network, for passes that must not trigger the wrapper's hooks."""

    @property
    def sharded(self) -> bool:
        """Whether ranks share the parameters and gather them for each pass.

        A graph then holds gathered copies, and the gradient of a parameter can only be accumulated by ``backward``. A
        backward through two passes would keep the whole gradient of every gathered parameter until the second has
        added to it, so each pass has one of its own.
        """

    @property
    def loss_scale(self) -> float | Tensor:
        """The factor by which fp16 training multiplies a loss before its backward; 1 otherwise."""

    def micro_step(self, *, last: bool) -> AbstractContextManager[None]:
        """Surrounds a micro-batch's passes; gradients are exchanged in the last one only."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of ``loss`` summed over ranks.

        Where ``sharded``, leaves that are no parameters accumulate this rank's own gradient, times the loss scale.
        """

    def whole(self, parameter: Tensor) -> Tensor:
        """All of a parameter of ``bare``; every rank calls it."""


class LocalEngine:
    """One process, no wrapper, no autocast: for a step's time, and for comparing gradients."""

    loss_scale = 1.0
    sharded = False

    def __init__(self, network: nn.Module) -> None:
        self.network: Any = network
        self.bare: Any = network

    def micro_step(self, *, last: bool) -> AbstractContextManager[None]:
        """Nothing is exchanged."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of ``loss``."""
        loss.backward()  # type: ignore[no-untyped-call]

    def whole(self, parameter: Tensor) -> Tensor:
        """The parameter."""
        return parameter


@dataclass(frozen=True)
class NoOptions:
    """Of a method without settings of its own."""


@dataclass(frozen=True)
class MethodSettings:
    """Settings from which a method is constructed.

    Attributes:
        objective: the settings of CA2CL's loss, whose temperature other contrastive losses share.
        projection_dim: ``model.projection_dim``.
        accumulation: how micro-batches combine.
        options: the method's own settings, ``Method.options`` made from the words of ``method.options``.
    """

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    projection_dim: int = 128
    accumulation: Literal["exact", "plain"] = "exact"
    options: Any = NoOptions()


class Method(ABC):
    """A self-supervised method: its network, its views and how a step's gradient is made (``training.loop.Method``)."""

    options: ClassVar[type] = NoOptions
    """A dataclass of the method's own settings, each a bool, int, float or str with a default: ``method.options``."""
    counters: Mapping[str, str] = {}
    """Terms of a step that are counts, added up over the run in the journal, and what each one counts."""
    curves: ClassVar[Sequence[Panel]] = (("Loss", "", (("loss", ""),)),)
    """Charts of the terms of a step; those of rate, norm and throughput are every method's."""
    accumulations: ClassVar[Sequence[str]] = ("plain",)
    """Values of ``run.accumulation`` with which a step may have several micro-batches; bitwise, only if it is named."""
    paths: ClassVar[Sequence[str]] = ()
    """Options that are paths of what a digest identifies: a run that is resumed may find it elsewhere."""
    graphs: ClassVar[int] = 2
    """Most forward passes of a micro-batch whose graphs a step holds at a time: its memory is estimated from that."""
    carried: int = 0
    """Gradients of all parameters that a step carries beside the one that the engine accumulates; under a sharded
    engine none."""
    teacher_source: TeacherSource | None = None
    """The frozen encoder that the method needs, if any: it is handed over by ``take_teacher`` before ``build``."""

    @classmethod
    def from_settings(cls, settings: MethodSettings) -> Method:
        """The method with those settings; by default it takes none.

        Raises:
            InputError: it cannot use one of them.
        """
        return cls()

    @classmethod
    def chance(cls, objective: ObjectiveConfig, tiles: int) -> Mapping[str, float]:
        """Values of terms where all similarities are equal, for the terms of which that is exact.

        Args:
            objective: the loss's settings.
            tiles: in the batch that the loss compares.
        """
        return {}

    def take_teacher(self, teacher: Teacher) -> None:
        """Receive the encoder of ``teacher_source``."""
        raise NotImplementedError(f"{type(self).__name__} names a teacher and takes none")

    @abstractmethod
    def build(self, encoder: Backbone) -> nn.Module:
        """The network to train: encoder, heads, and a teacher that is trained with them (a moving average).

        It is called with images (B, 3, S, S), autocasts its passes to its attribute ``autocast_dtype`` (None: to none;
        ``models.heads.EncoderNetwork`` does), and its ``state_dict`` is what checkpoints hold.
        """

    def encoder(self, network: Any) -> Backbone:
        """The part of ``build``'s network that is registered in the end."""
        encoder: Backbone = network.encoder
        return encoder

    def embeddings(self, network: Any, features_BD: Tensor) -> Tensor | None:
        """What the loss compares of an encoder's features, (B, E): if that is the same for all tiles, nothing is learnt
        any more. By default the first head of an ``EncoderNetwork``, and None for other networks."""
        return network.heads(features_BD)[0] if isinstance(network, EncoderNetwork) else None

    def views(self, tiles: Tiles, views: Views) -> Any:
        """The input of ``step`` for one micro-batch, by default a strong and a weak view.

        A pure function: exact accumulation calls it several times and relies on equal results.
        """
        made = views(tiles.pixels, tiles.keys, tiles.epoch)
        x1, x2 = (x.contiguous(memory_format=torch.channels_last) for x in made)
        return ViewBatch(x1, x2, tiles.positions, tiles.second_order, tiles.words, tiles.slides)

    @abstractmethod
    def step(self, engine: Engine, micro_batches: Sequence[Any]) -> dict[str, Tensor]:
        """Accumulate the gradient of one optimizer step, by one ``engine.backward`` a micro-batch.

        Returns:
            The step's terms as scalars, ``loss`` among them, the same on every rank.
        """

    def after_step(self, network: Any, step: int, total_steps: int) -> None:  # noqa: B027 - not every method has one
        """Update state without gradients, such as an EMA teacher or a queue, after optimizer step ``step``.

        Not called after a skipped step.
        """

    @property
    def least_tiles(self) -> int:
        """Fewest tiles that the loss takes."""
        return 2

    def too_few(self, tiles: int) -> tuple[str, str]:
        """Reason for refusing a batch of ``tiles``, and a setting that would allow it."""
        return f"the loss needs at least {self.least_tiles} tiles", ""

    def figures(self, network: Any, tiles_NHWC: Tensor, batches: Iterable[Tensor]) -> dict[str, Figure]:
        """Figures of the learned representation, by name; called on one process, without gradient.

        Args:
            network: in evaluation mode.
            tiles_NHWC: some training tiles, uint8, on the host.
            batches: the same tiles as the encoder's input, batch after batch, on the device.
        """
        return {}
