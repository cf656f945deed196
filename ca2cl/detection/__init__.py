"""Encoders as detection backbones. The only package that imports detectron2."""
