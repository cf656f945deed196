"""``ca2cl doctor --leaks``: slides and tiles that two sets of shards share."""
