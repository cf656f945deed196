"""``ca2cl heatmap``: classes or clusters of tiles, laid over their slides."""
