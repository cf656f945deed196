"""Heads of detectors, by name."""

from __future__ import annotations

from typing import Literal

Head = Literal["mask_rcnn_fpn", "mask_rcnn_c4", "retinanet_fpn"]
"""Mask R-CNN on a feature pyramid; on res4 with res5 as its box head and the extra norm after it (the MoCo protocol's
C4); RetinaNet, which has no masks."""


def has_masks(head: Head) -> bool:
    """True where a detector with this head finds masks, and needs them to learn from."""
    return head != "retinanet_fpn"
