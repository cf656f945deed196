"""Registry of detector engines, with the default."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from ca2cl.detection.engines.base import Detector, Engine, EngineName
from ca2cl.detection.engines.checkpoint import read_card
from ca2cl.errors import InputError

EngineChoice = EngineName | Literal["auto"]


def _torchvision() -> Engine:
    from ca2cl.detection.engines.torchvision import TorchvisionEngine

    return TorchvisionEngine()


def _detectron2() -> Engine:
    from ca2cl.detection.engines.detectron2 import Detectron2Engine

    return Detectron2Engine()


ENGINES: dict[str, Callable[[], Engine]] = {"torchvision": _torchvision, "detectron2": _detectron2}


def find_engine(name: EngineChoice, *, says: bool = True) -> Engine:
    """An engine; ``auto`` is detectron2 where it is installed, and torchvision otherwise.

    Args:
        says: whether to say, on standard error, that detectron2 is not there and how to get it.

    Raises:
        MissingPackage: detectron2 was asked for and is not installed.
    """
    if name != "auto":
        return ENGINES[name]()
    if find_spec("detectron2") is not None:
        return _detectron2()
    if says:
        from ca2cl.detection.engines.detectron2_weights import RECIPE

        sys.stderr.write(f"engine torchvision; detectron2 is not installed: {RECIPE}\n")
    return _torchvision()


def load_detector(folder: Path, device: str) -> Detector:
    """A saved detector, by the engine that made it.

    Raises:
        InputError: nothing there, damaged, or of an engine that this version does not have.
        MissingPackage: it is detectron2's, which is not installed.
    """
    name = read_card(folder).engine
    if name not in ENGINES:
        raise InputError(f"{folder}: a detector of engine {name}; this ca2cl has {' and '.join(ENGINES)}")
    return ENGINES[name]().load(folder, device)
