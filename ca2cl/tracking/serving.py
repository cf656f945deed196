"""Import path of pyfuncs that were registered by ca2cl 0.1."""

from ca2cl.registry.serving import TileClassifier, TileEncoder

__all__ = ["TileClassifier", "TileEncoder"]
