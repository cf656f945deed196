"""Import path of ``engines.predictions`` before the folders were made."""

from ca2cl.detection.engines.predictions import Detections

__all__ = ["Detections"]
