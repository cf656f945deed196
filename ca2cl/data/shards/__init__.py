"""``ca2cl shard``: WebDataset tars, their index and manifest."""
