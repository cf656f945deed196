"""The export formats by name."""

from __future__ import annotations

from ca2cl.export.config import FORMATS
from ca2cl.export.to_detectron2 import DETECTRON2
from ca2cl.export.to_onnx import ONNX
from ca2cl.export.to_safetensors import SAFETENSORS
from ca2cl.export.to_timm import TIMM
from ca2cl.export.to_torchvision import TORCHVISION

TARGETS = {target.name: target for target in (TORCHVISION, TIMM, DETECTRON2, ONNX, SAFETENSORS)}
assert tuple(TARGETS) == FORMATS
