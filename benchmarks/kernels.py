"""What a pre-training step would launch, move and wait for on a GPU, counted without one.

    python -m benchmarks.kernels [--batch 896] [--processes 2] [--norm sync] [--views ca2cl] [--precision bf16]
                                 [--arch resnet18] [--size 224] [--micro_batches 1] [--json FILE]

The real code runs on torch's meta device, which stands in for the GPU: every operation has its shapes and computes
nothing. A dispatch mode counts kernels, the bytes that they read and write, copies between host and device, and reads
of the device's numbers, by the innermost line of ca2cl that asked for them. Several processes are torch's ``fake``
process group, of which this is rank 0. ``--batch`` is tiles a process.

The modelled time is no measurement. A kernel takes the longer of ``--launch_us`` and its bytes over ``--tb_per_s``, one
after another; a collective ``--collective_us``. What the encoder itself takes is published instead of modelled:
``--encoder_ms`` a tile, .61 for ResNet-18 at 224 px on an A100 (FFCV's 16 epochs of ImageNet in 35.0 minutes at 160 to
192 px, scaled by pixels to 224 px and by passes to this step's 3 forward and 3.5 backward ones). The share is that time
over itself plus everything else: the modelled time of views, step and loop, less that of the same passes of a bare
encoder with torch's own BatchNorm.
"""

from __future__ import annotations

import argparse
import json
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import ca2cl
from ca2cl.config import IMAGENET_MEAN, IMAGENET_STD, ObjectiveConfig, OptimConfig, ViewsConfig
from ca2cl.data.loading.stream import TileBatch
from ca2cl.methods.ca2cl.method import CA2CL
from ca2cl.models.backbone import build_encoder
from ca2cl.models.bn_groups import LaneGroups
from ca2cl.models.heads import Network
from ca2cl.pretrain.batches import MicroBatches
from ca2cl.runtime.accelerator import build_accelerator
from ca2cl.runtime.precision import HALF
from ca2cl.training.engine import AccelerateEngine
from ca2cl.training.optim import build_optimizer
from ca2cl.training.readings import Reading
from ca2cl.views.build import build_views

META = torch.device("meta")
PACKAGE = Path(ca2cl.__file__).parent
PASSES = {"network": 3, "bare backward": 3, "bare direction": 1}
"""Passes of one view in a step with the adversary, whose direction needs a backward of activations alone."""
_FREE = frozenset([
    "view", "_unsafe_view", "expand", "permute", "transpose", "t", "slice", "select", "unsqueeze", "squeeze",
    "detach", "alias", "as_strided", "as_strided_", "unbind", "split", "split_with_sizes", "_reshape_alias", "reshape",
    "unfold", "diagonal", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "narrow",
    "lift_fresh", "view_as", "set_", "is_same_size", "sym_size", "stride", "numel", "chunk", "empty_permuted",
    "is_pinned", "_pin_memory",
])  # fmt: skip
"""Operators that launch nothing."""
_WAITS = frozenset([
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2", "unique_consecutive",
])  # fmt: skip
"""Operators for whose result the host waits."""
_INSIDE = {
    "batch_norm_statistics": 2,
    "batch_norm_input_gradient": 5,
    "native_batch_norm": 2,
    "native_batch_norm_backward": 2,
}
"""Kernels that an operator launches on CUDA, where that is not one."""
_TWICE = {"native_batch_norm": (1, 5), "native_batch_norm_backward": (2, 7)}
"""Operators of which one kernel reduces and one normalises: how many first arguments both read, and which argument says
that it is training."""
_FILLS = frozenset([
    "fill", "zero", "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones",
    "new_full", "arange",
])  # fmt: skip
_STAGES = {
    "views": "views", "models": "network", "nt_xent": "loss", "cluster_loss": "loss", "losses": "loss",
    "gather": "loss", "adversary": "loss", "batches": "feed", "kernels": "bare backward", "optim": "optimizer",
    "engine": "optimizer", "readings": "optimizer",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts by stage what operations on the meta device would do on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: dict[str, Counter[str]] = defaultdict(Counter)
        self.kernels: dict[str, list[int]] = defaultdict(list)
        """Bytes of every kernel, by stage."""
        self.copies: Counter[str] = Counter()
        """Lines that copy to the device."""
        self.waits: Counter[str] = Counter()
        """Lines at which the host waits for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        reads = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name == "_local_scalar_dense" and reads[0].is_meta:
            self._wait(name)
            return 1.0 if reads[0].is_floating_point() else 1
        if name in ("_to_copy", "to") and reads[0].is_meta and kwargs.get("device", META) != META:
            self._wait("copy to the host")
            return torch.zeros(reads[0].shape, dtype=kwargs.get("dtype") or reads[0].dtype)
        out = func(*args, **kwargs)
        if name in ("convolution", "convolution_backward"):
            out = _as_cudnn_leaves_it(out, reads)
        writes = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if name == "native_batch_norm_backward" and not args[-1][0]:
            writes = writes[1:]  # only the meta kernel makes a gradient of the input that is not asked for
        if not any(x.is_meta for x in (*reads, *writes)):
            return out
        if name in ("_to_copy", "copy_", "_copy_from") and any(not x.is_meta and x.ndim for x in reads):
            self._copy(name, args, kwargs, writes)
        elif name in _WAITS:
            self._wait(name)
        elif name not in _FREE:
            base = name.rstrip("_")
            stage, _ = _here()
            self.stages[stage]["launches"] += _INSIDE.get(name, 1)
            moved = 0 if base in _FILLS else sum(map(_bytes, reads))
            if base in ("index_select", "index", "gather"):  # reads only what it takes
                moved = sum(map(_bytes, writes)) + sum(map(_bytes, reads[1:]))
            moved += sum(map(_bytes, writes))
            operands, training = _TWICE.get(name, (0, 0))
            if operands and args[training]:
                moved += sum(map(_bytes, args[:operands]))
            self.stages[stage]["bytes"] += moved
            self.kernels[stage] += [moved, *[0] * (_INSIDE.get(name, 1) - 1)]
        return out

    def _copy(self, name: str, args: Any, kwargs: Any, writes: list[Tensor]) -> None:
        stage, line = _here()
        waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        tiles = any(x.dtype == torch.uint8 and x.ndim == 4 for x in writes)
        self.stages[stage]["tile_copies" if tiles else "copies"] += 1
        self.copies[line] += 1
        if waits:
            self.stages[stage]["host_syncs"] += 1
            self.waits[f"blocking copy to the device, {line}"] += 1

    def _wait(self, what: str) -> None:
        stage, line = _here()
        self.stages[stage]["host_syncs"] += 1
        self.waits[f"{what}, {line}"] += 1

    def total(self, what: str, *stages: str) -> int:
        """A count over all stages, or over those given."""
        return sum(counts[what] for name, counts in self.stages.items() if not stages or name in stages)

    def milliseconds(self, rates: argparse.Namespace, *stages: str) -> float:
        """Modelled time of all stages, or of those given."""
        chosen = [b for name, kernels in self.kernels.items() if not stages or name in stages for b in kernels]
        return sum(max(rates.launch_us / 1e3, b / rates.tb_per_s / 1e9) for b in chosen)


def _as_cudnn_leaves_it(out: Any, reads: list[Tensor]) -> Any:
    """What a convolution makes, channels_last where anything that it reads is: the meta kernels forget that."""
    layout = torch.channels_last
    if not any(x.ndim == 4 and x.is_contiguous(memory_format=layout) for x in reads):
        return out
    return tree_map_only(Tensor, lambda x: torch.empty_like(x, memory_format=layout) if x.ndim == 4 else x, out)


def _bytes(x: Tensor) -> int:
    """Bytes of memory behind a tensor: what is expanded is there once."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride or size <= 1 else 1
    return count * x.element_size()


def _here() -> tuple[str, str]:
    """Stage and line of the innermost frame of the package (or of this file)."""
    for frame, number in traceback.walk_stack(None):
        path = Path(frame.f_code.co_filename)
        if path == Path(__file__) and frame.f_code.co_name not in (
            "main",
            "count_step",
            "bare_passes",
            "bare_direction",
        ):
            continue
        if path.parent == PACKAGE / "runtime":  # to_device and its like: whoever calls it
            continue
        if path == Path(__file__) or PACKAGE in path.parents:
            name = frame.f_code.co_name
            if name == "bare_direction":
                stage = "bare direction"
            elif name in ("_record", "commit_statistics", "_track", "take_recorded"):
                stage = "running statistics"
            else:
                parts = [*path.parts[len(PACKAGE.parts) : -1], path.stem] if PACKAGE in path.parents else [path.stem]
                stage = next((_STAGES[part] for part in parts if part in _STAGES and name != "backward"), "backward")
            return stage, f"{'/'.join(path.parts[-2:])}:{number}"
    return "other", "?"


class _HalfPrecision(TorchFunctionMode):
    """What autocast casts in these networks; the meta device has no autocast of its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.conv2d, F.linear, torch.conv2d):
            args = tuple(x.to(self.dtype) if isinstance(x, Tensor) and x.dtype == torch.float32 else x for x in args)
        return func(*args, **(kwargs or {}))


@contextmanager
def meta_autocast() -> Iterator[None]:
    """Let the network autocast on the meta device."""
    autocast = torch.autocast

    def imitated(kind: str, dtype: torch.dtype | None = None, enabled: bool = True, **kwargs: Any) -> Any:
        if kind != "meta":
            return autocast(kind, dtype, enabled, **kwargs)
        return _HalfPrecision(dtype if enabled and dtype is not None else torch.float32)

    with patch("torch.autocast", imitated):
        yield


@contextmanager
def fake_ranks(world: int) -> Iterator[Counter[str]]:
    """This process as rank 0 of ``world``; counts collectives."""
    calls: Counter[str] = Counter()
    if world == 1:
        yield calls
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)

    def counted(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> None:
            calls[name] += 1

        return call

    try:
        with (
            patch.object(dist, "all_reduce", counted("all_reduce")),
            patch.object(dist, "all_gather", counted("all_gather")),
        ):
            yield calls
    finally:
        dist.destroy_process_group()


def build_engine(arch: str, norm: Any, precision: Any) -> AccelerateEngine:
    """The real engine on the meta device."""
    accelerator = build_accelerator()
    accelerator.device_placement = False
    with patch.object(Accelerator, "device", property(lambda _: META)):
        network = Network(build_encoder(arch, norm)).train()
        optimizer = build_optimizer(OptimConfig(name="adam"), network, fused=True)
        return AccelerateEngine(accelerator, network, optimizer, precision)


def count_step(options: argparse.Namespace, objective: ObjectiveConfig | None = None) -> tuple[Launches, Counter[str]]:
    """One whole step of ``smoke``'s method: feed, views, passes, losses, optimizer and the loop's reads."""
    size, batch, world = options.size, options.batch, options.processes
    config = ViewsConfig(recipe=options.views)
    dtype = HALF.get(options.precision, torch.float32)
    views = build_views(config, size, mean=IMAGENET_MEAN, std=IMAGENET_STD, seed=0, dtype=dtype)
    keys = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=torch.Generator().manual_seed(0))
    rows = torch.arange(batch)
    tiles = torch.empty(1, dtype=torch.uint8).expand(batch, size, size, 3)
    data = TileBatch(0, 0, tiles, keys, rows, rows, rows, [""] * batch, [])
    groups = None
    if options.norm == "lane_group":
        groups = LaneGroups(
            batch, batch, 16, next(k for k in (4, 2, 1) if batch // options.micro_batches % (16 * k) == 0)
        )
    method = CA2CL(objective or ObjectiveConfig())
    counts = Launches()
    with fake_ranks(world) as collectives, meta_autocast():
        engine = build_engine(options.arch, options.norm, options.precision)
        with patch.object(Accelerator, "device", property(lambda _: META)), counts:
            micro_batches = MicroBatches(
                data, lambda part: method.views(part, views), META, batch // options.micro_batches, groups
            )
            engine.keep_buffers()
            terms = method.step(engine, micro_batches)
            Reading(terms, engine.optimizer_step(1e-3, None, terms["loss"]), {}).read()
    return counts, collectives


def bare_passes(options: argparse.Namespace) -> Launches:
    """The same passes of the encoder alone, with torch's BatchNorm and a gradient of every parameter."""
    counts = Launches()
    with meta_autocast():
        network = build_encoder(options.arch, "sync").train().to(META, memory_format=torch.channels_last)  # type: ignore[call-overload]
        dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.precision]
        x = torch.empty(options.batch, 3, options.size, options.size, device=META)
        x = x.contiguous(memory_format=torch.channels_last)
        with counts, torch.autocast("meta", dtype):
            total = network(x).sum()
            bare_direction(total, network.stem.weight)
            total.backward()
    return counts


def bare_direction(total: Tensor, weight: Tensor) -> None:
    """The backward pass that the adversary's direction takes through the weak view."""
    torch.autograd.grad(total, weight, retain_graph=True)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=896, help="tiles a process")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--norm", choices=("sync", "lane_group", "frozen"), default="sync")
    parser.add_argument("--views", choices=("ca2cl", "crop"), default="ca2cl")
    parser.add_argument("--precision", choices=("no", "bf16"), default="bf16")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--micro_batches", type=int, default=1)
    parser.add_argument("--launch_us", type=float, default=5.0)
    parser.add_argument("--tb_per_s", type=float, default=1.5)
    parser.add_argument("--collective_us", type=float, default=50.0)
    parser.add_argument("--encoder_ms", type=float, default=0.61, help="published, a tile of a step")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(words)


def main() -> int:
    """Print the table of stages, the lines at which the host waits, and the share; write them as JSON."""
    options = parse()
    counts, collectives = count_step(options)
    report = summarize(options, counts, collectives, bare_passes(options))
    print(table(options, counts))
    for line, number in counts.waits.most_common(20):
        print(f"the host waits {number} times: {line}")
    for line, number in counts.copies.most_common(20):
        print(f"{number} copies to the device: {line}")
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return 0


def summarize(
    options: argparse.Namespace, counts: Launches, collectives: Counter[str], bare: Launches
) -> dict[str, Any]:
    """The numbers that are compared, by name."""
    own = options.encoder_ms * options.batch
    passes = sum(times * bare.milliseconds(options, stage) for stage, times in PASSES.items())
    more = max(0.0, counts.milliseconds(options) - passes) + options.collective_us / 1e3 * collectives.total()
    step = [stage for stage in counts.stages if stage != "views"]
    return {
        "batch": options.batch, "processes": options.processes, "norm": options.norm, "views_recipe": options.views,
        "views": {
            "launches": counts.total("launches", "views"), "bytes": counts.total("bytes", "views"),
            "copies": counts.total("copies", "views"), "host_syncs": counts.total("host_syncs", "views"),
        },
        "step": {
            "launches": counts.total("launches", *step), "bytes": counts.total("bytes", *step),
            "host_syncs": counts.total("host_syncs", *step), "collectives": collectives.total(),
        },
        "encoder_ms": own, "modelled_ms_beside_the_encoder": round(more, 1), "share": round(own / (own + more), 3),
    }  # fmt: skip


def table(options: argparse.Namespace, counts: Launches) -> str:
    """Counts by stage, as a Markdown table."""
    lines = [
        "| stage | launches | GB moved | copies | host waits | modelled ms |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, one in sorted(counts.stages.items()):
        lines.append(
            f"| {name} | {one['launches']} | {one['bytes'] / 1e9:.2f} | {one['copies']} | {one['host_syncs']} | "
            f"{counts.milliseconds(options, name):.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
