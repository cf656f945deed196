"""Check the machine: versions, devices, precisions, shared memory, tracking store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import metadata

import psutil
import torch

from ca2cl.doctor.finding import Finding
from ca2cl.errors import InputError
from ca2cl.runtime.launched import keeps_to_cpu, unseen_gpus
from ca2cl.runtime.precision import EMULATED, HALF, slowdown

_OLDEST_TORCH = (2, 6)
_SHARED = 1 << 30
_GIGABYTE = 1e9


def machine(tracking_uri: str | None, tracking_root: str) -> Iterator[Finding]:
    """Findings that do not depend on a job, each as soon as it is made."""
    yield versions()
    yield devices()
    yield from precisions()
    yield shared_memory()
    yield store(tracking_uri, tracking_root)


def versions() -> Finding:
    """Packages that decide what works."""
    names = ("torch", "torchvision", "accelerate", "mlflow", "webdataset", "deepspeed")
    found = []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    text = ", ".join(found)
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _OLDEST_TORCH:
        return Finding("versions", "wrong", text, "install torch 2.6 or newer")
    return Finding("versions", "ok", text)


def devices() -> Finding:
    """GPUs, or the cores that stand in for them."""
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        return Finding("devices", "ok", ", ".join(f"{p.name} {p.total_memory / _GIGABYTE:.0f} GB" for p in found))
    gpus = unseen_gpus()
    if gpus and not keeps_to_cpu():
        text = f"{gpus} NVIDIA GPUs are in this machine, but torch sees none"
        return Finding("devices", "wrong", text, "see nvidia-smi: load the driver, or install a torch built with CUDA")
    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory()
    text = f"no GPU; {cores} CPU cores, {memory.available / _GIGABYTE:.1f} of {memory.total / _GIGABYTE:.1f} GB free"
    return Finding("devices", "note", text, "fine for trials; a real run wants GPUs")


def precisions() -> Iterator[Finding]:
    """Gain of run.precision bf16 and fp16: a convolution of the encoder, timed forward and backward."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, kind in HALF.items():
        try:
            ratio = slowdown(device, kind)
        except RuntimeError as error:
            yield Finding(name, "note", f"not here: {str(error).splitlines()[0]}", "use another precision")
            continue
        text = f"a 3 x 3 convolution takes {ratio:.2f} of fp32's time on {device.type}"
        remedy = "emulated here: train with --run.precision no" if ratio > EMULATED else ""
        yield Finding(name, "note" if remedy else "ok", text, remedy)


def shared_memory() -> Finding:
    """Decoding workers hand tiles over in anonymous shared memory; torch's and NCCL's own tools still use /dev/shm."""
    how = "--shm-size=8g, or an emptyDir of medium Memory"
    try:
        free = psutil.disk_usage("/dev/shm").free
    except OSError:
        return Finding("shared memory", "wrong", "no /dev/shm", f"mount one: {how}")
    text = f"{free / _GIGABYTE:.1f} GB free in /dev/shm"
    if free < _SHARED:
        return Finding("shared memory", "wrong", text, f"give the container more: {how}")
    return Finding("shared memory", "ok", text)


def store(uri: str | None, root: str) -> Finding:
    """The MLflow store, and whether it answers."""
    from ca2cl.store.open import open_store

    try:
        found = open_store(uri, root)
    except InputError as error:
        return Finding("MLflow", "wrong", str(error), "training goes on without it: ca2cl sync RUN_DIR catches up")
    return Finding("MLflow", "ok", f"{found.place} answers")
