"""Import path that pyfuncs registered by ca2cl 0.1 name in their saved code."""

from ca2cl.registry.serving import TileClassifier, TileEncoder

__all__ = ["TileClassifier", "TileEncoder"]
