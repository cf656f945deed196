"""ca2cl: cluster-aware adversarial contrastive learning of pathology image encoders."""

__version__ = "0.1.0"
