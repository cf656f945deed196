"""Registry of detector engines, with the default."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import cast, get_args

from ca2cl.detection.engines.base import Detector, Engine
from ca2cl.detection.engines.checkpoint import read_card
from ca2cl.detection.engines.settings import EngineChoice, EngineName
from ca2cl.errors import InputError


def find_engine(name: EngineChoice, *, hint: bool = True) -> Engine:
    """An engine; ``auto`` is detectron2 where it is installed, and torchvision otherwise.

    Args:
        hint: say on standard error, for ``auto``, that torchvision was taken.

    Raises:
        MissingPackage: detectron2 was chosen and is not installed.
    """
    if name == "auto":
        name = "detectron2" if find_spec("detectron2") is not None else "torchvision"
        if hint and name == "torchvision":
            sys.stderr.write("engine torchvision; --engine detectron2 is the other one (docs/detection.md)\n")
    if name == "detectron2":
        from ca2cl.detection.engines.detectron2 import Detectron2Engine

        return Detectron2Engine()
    from ca2cl.detection.engines.torchvision import TorchvisionEngine

    return TorchvisionEngine()


def load_detector(folder: Path, device: str) -> Detector:
    """A saved detector, by the engine that made it.

    Raises:
        InputError: nothing there, damaged, or of an engine that this version does not have.
        MissingPackage: it is detectron2's, which is not installed.
    """
    name = read_card(folder).engine
    if name not in get_args(EngineName):
        raise InputError(f"{folder}: a detector of engine {name}; this ca2cl has {' and '.join(get_args(EngineName))}")
    return find_engine(cast(EngineName, name)).load(folder, device)
