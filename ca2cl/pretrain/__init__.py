"""``ca2cl pretrain``: builds a pre-training job, runs it and registers the encoder."""
