"""Sources, shards and their index, lanes (the stream), splits, made-up tissue."""
