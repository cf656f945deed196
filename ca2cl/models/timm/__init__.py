"""timm's bodies as backbones, by the name ``timm:NAME``."""
