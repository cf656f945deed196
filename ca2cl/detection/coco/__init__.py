"""COCO files of instances: reading, validation, masks and average precision."""
