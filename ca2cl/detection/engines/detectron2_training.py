"""Training by detectron2's trainer: data mapper, order and hooks.

The parts are put together as detectron2's ``tools/lazyconfig_train_net.py`` does and not by ``DefaultTrainer``, which
its authors call unstable, needs their launcher, and cannot run several processes on CPUs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.engine import AMPTrainer, SimpleTrainer, hooks
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.structures import BoxMode
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import update_bn_stats
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ca2cl.common.files import write_atomic
from ca2cl.common.records import load_tensors
from ca2cl.detection.coco.segmentations import Json
from ca2cl.detection.engines.base import REMEDY, Detector, TrainJob, Watch
from ca2cl.detection.engines.checkpoint import KEPT
from ca2cl.detection.engines.data import AnnotatedImages, draw_word, read_batches
from ca2cl.detection.engines.settings import Schedule, has_masks
from ca2cl.detection.network.optimizer import detector_optimizer
from ca2cl.errors import InputError, LocalError
from ca2cl.training.param_groups import set_rates

_NAME = re.compile(r"model_\w+\.pth")
Example = dict[str, Any]


class MappedImages(AnnotatedImages[Example]):
    """Examples for detectron2's models, made by its mapper.

    The mapper draws its augmentation from numpy's global generator. It is seeded by seed and place, so that an image is
    the same on any number of processes and workers, and after another start.
    """

    def __init__(self, cfg: CfgNode, job: TrainJob) -> None:
        schedule = job.schedule
        super().__init__(job.train, job.classes, schedule.batch_size, schedule.seed, masks=has_masks(job.head))
        self._mapper = DatasetMapper(cfg, is_train=True)

    def example(self, image: Json, place: int, flipped: bool) -> Example:
        """The mapper's output. It draws the flip itself."""
        described = self._described(image)
        before = np.random.get_state()
        np.random.seed(draw_word(self.order.seed, place))
        try:
            return dict(self._mapper(described))
        except (OSError, ValueError, SyntaxError) as error:  # unreadable, of another size, a broken PNG
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise LocalError(f"{described['file_name']}: {reason}; {REMEDY}") from None
        finally:
            np.random.set_state(before)

    def _described(self, image: Json) -> Example:
        """In detectron2's format of a data set."""
        return {
            "file_name": str(self.split.path(image)),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": [
                {
                    "bbox": row["bbox"], "bbox_mode": BoxMode.XYWH_ABS, "category_id": row["label"],
                    "segmentation": row.get("segmentation", []), "iscrowd": 0,
                }
                for row in self.rows[image["id"]]
            ],
        }  # fmt: skip


class _Checkpointer(DetectionCheckpointer):  # type: ignore[misc, unused-ignore]
    """detectron2's, that keeps one checkpoint and never a torn name of it, and reads none but its own: detectron2
    follows the name in ``last_checkpoint`` anywhere, and unpickles what ends with ``.pkl``."""

    def get_checkpoint_file(self) -> str:
        """Path of the newest checkpoint, "" where there is none.

        Raises:
            InputError: the name is not one that training gives.
        """
        found = Path(super().get_checkpoint_file())
        if found != Path() and (found.parent != Path(self.save_dir) or not _NAME.fullmatch(found.name)):
            raise InputError(f"{self.save_dir}/last_checkpoint: {found.name[:80]!r} is none; delete it and start again")
        return "" if found == Path() else str(found)

    def _torch_load(self, f: str) -> Any:
        try:
            return load_tensors(f)
        except ValueError as error:
            raise InputError(f"{f}: damaged ({error}); delete {self.save_dir} and start again") from None

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        folder = Path(self.save_dir)
        write_atomic(folder / "last_checkpoint", last_filename_basename.encode(), KEPT)
        for path in folder.glob("*.pth"):
            if path.name != last_filename_basename:
                path.unlink()


class _Average:
    """RetinaNet's running mean of positive anchors, which scales its losses: detectron2 keeps it as a plain attribute,
    so its own checkpoints lack it."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def state_dict(self) -> dict[str, float]:
        """The attribute, where there is one by now."""
        return {name: value for name, value in vars(self.network).items() if name == "loss_normalizer"}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Set it again."""
        vars(self.network).update(state)


class _Stopped(BaseException):
    """Ends the trainer's loop after a step. Not an ``Exception``: those it logs, with their traceback."""


def _optimizer(cfg: CfgNode, schedule: Schedule, network: Any) -> torch.optim.Optimizer:
    """detectron2's, or ``detector_optimizer``'s for what detectron2's configuration has no words for."""
    if schedule.optimizer == "sgd" and schedule.layer_decay is None:
        made: torch.optim.Optimizer = build_optimizer(cfg, network)
        return made
    optimizer = detector_optimizer(schedule.optim, network, network.backbone.pyramid.body)
    set_rates(optimizer.param_groups, schedule.lr)  # from which detectron2's schedule goes on, group by group
    return optimizer


class Training:
    """One training: trainer, checkpointer and data, put together.

    Args:
        cfg: with its schedule.
        job: what is trained on what.
        detector: its network is not wrapped.
        watch: the job's.
    """

    def __init__(self, cfg: CfgNode, job: TrainJob, detector: Detector, watch: Watch) -> None:
        self.job, self.network, self.detector, self.watch = job, detector.network, detector, watch
        self.images = MappedImages(cfg, job)
        self.pin = torch.device(job.device).type == "cuda"
        wrapped: nn.Module = self.network.train()
        if comm.get_world_size() > 1:
            ids = [torch.cuda.current_device()] if self.pin else None
            wrapped = DistributedDataParallel(self.network, device_ids=ids, broadcast_buffers=False)
        optimizer = _optimizer(cfg, job.schedule, self.network)
        kind = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self.trainer = kind(wrapped, self._from_start(), optimizer)
        self.start = 0
        job.folder.mkdir(parents=True, exist_ok=True)
        average = _Average(self.network)
        self.checkpointer = _Checkpointer(self.network, str(job.folder), trainer=self.trainer, average=average)
        self.trainer.register_hooks(
            [
                hooks.IterationTimer(),
                hooks.LRScheduler(optimizer, build_lr_scheduler(cfg, optimizer)),
                hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD)
                if comm.is_main_process()
                else None,
                # last: the step is done then, its rate known and its checkpoint written
                hooks.CallbackHook(before_step=self._before_step, after_step=self._after_step),
            ]
        )

    def run(self) -> bool:
        """Train from the newest checkpoint to the end; False after a stop.

        Raises:
            InputError: a loss that is not finite, an image that cannot be read.
        """
        iterations = self.job.schedule.iterations
        self.checkpointer.resume_or_load("", resume=True)
        self.start = self.trainer.iter + 1 if self.checkpointer.has_checkpoint() else 0
        if self.start < iterations:
            try:
                self.trainer.train(self.start, iterations)
            except _Stopped:
                return False
            except FloatingPointError as error:
                reason = " ".join(str(error).split())[:160]
                raise InputError(f"step {self.trainer.iter + 1}: {reason}; use a lower lr or a longer warmup") from None
        self._make_precise()
        return True

    def _before_step(self, trainer: Any) -> None:
        """Proposals are drawn from torch's generator: a run that goes on must draw the same ones."""
        torch.manual_seed(draw_word(self.job.schedule.seed, trainer.iter, comm.get_rank()))

    def _after_step(self, trainer: Any) -> None:
        """Report the step, evaluate where it is time, and stop where a rank got a signal."""
        schedule, step = self.job.schedule, trainer.iter + 1
        everyone = comm.all_gather((self._values(trainer), self.watch.stop.overdue(first=False)))
        self.watch.on_step(step, everyone[0][0])
        if step == schedule.iterations:
            return
        if schedule.evaluate_every and step % schedule.evaluate_every == 0:
            with self.watch.stop.unhurried():
                self._make_precise()
                self.watch.on_evaluation(step, self.detector)
        if any(stop for _, stop in everyone):
            with self.watch.stop.unhurried():
                self.checkpointer.save(f"model_{trainer.iter:07d}")
            raise _Stopped

    def _values(self, trainer: Any) -> dict[str, float]:
        """Values of this step from rank 0's storage; none on the others."""
        if not comm.is_main_process():
            return {}
        now = {name: value for name, (value, at) in trainer.storage.latest().items() if at == trainer.iter}
        losses = {name: value for name, value in now.items() if name.startswith("loss_")}
        values = {"loss": now.get("total_loss", sum(losses.values())), **losses, "lr": now["lr"]}
        if now.get("time"):
            values["images_per_s"] = self.job.schedule.batch_size / now["time"]
        return {name: float(value) for name, value in values.items()} | {"data_wait_s": float(now["data_time"])}

    def _make_precise(self) -> None:
        """Estimate the running statistics anew, where the schedule has it (Wu and Johnson, arXiv 2105.07576,
        section 3), always over the same batches. Every rank calls it."""
        steps = self.job.schedule.precise_steps
        if steps:
            torch.manual_seed(self.job.schedule.seed)
            with EventStorage():
                update_bn_stats(self.network, self._batches(range(steps)), steps)

    def _from_start(self) -> Iterator[list[Example]]:
        """A generator, so that ``start`` is read with the first batch: only then is it known."""
        yield from self._batches(range(self.start, self.job.schedule.iterations))

    def _batches(self, steps: range) -> Iterator[list[Example]]:
        ranks = {"rank": comm.get_rank(), "world": comm.get_world_size()}
        return read_batches(self.images, steps, **ranks, workers=self.job.workers, pin=self.pin)
