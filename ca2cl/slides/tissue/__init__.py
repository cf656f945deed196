"""Tissue on a slide: its mask, artefacts, and the sharpness of tiles."""
