"""COCO files of instances: reading, validation, masks and average precision."""

from ca2cl.detection.coco.files import encode_mask, read_coco

__all__ = ["encode_mask", "read_coco"]
