"""Glands: data, encoders as backbones, engines, scores. The only package that imports detectron2 or pycocotools."""
