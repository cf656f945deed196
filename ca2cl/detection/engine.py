"""Import path of ``engines.base`` before the folders were made."""

from ca2cl.detection.engines.base import CocoSplit, Detector, Engine

__all__ = ["CocoSplit", "Detector", "Engine"]
