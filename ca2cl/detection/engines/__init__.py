"""Detector engines: torchvision's and detectron2's."""
