"""Whole-slide images: reading, tissue, and the tiles that are cut from them."""
