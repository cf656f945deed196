"""ca2cl: cluster-aware adversarial contrastive learning of pathology image encoders.

Names for notebooks and other trainers (docs/python.md). They are imported when they are first used, so that ``import
ca2cl`` and the command line do not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ca2cl.api.embedding import embed
    from ca2cl.api.encoder import Encoder, Transform, load_encoder
    from ca2cl.api.objectives import cluster_loss, nt_xent
    from ca2cl.api.shard_dataset import ShardDataset
    from ca2cl.api.two_views import Views

__version__ = "0.1.0"
__all__ = ["Encoder", "ShardDataset", "Transform", "Views", "cluster_loss", "embed", "load_encoder", "nt_xent"]
_HOMES = {
    "Encoder": "encoder",
    "ShardDataset": "shard_dataset",
    "Transform": "encoder",
    "Views": "two_views",
    "cluster_loss": "objectives",
    "embed": "embedding",
    "load_encoder": "encoder",
    "nt_xent": "objectives",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ca2cl' has no attribute {name!r}")
    return getattr(import_module(f"ca2cl.api.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
