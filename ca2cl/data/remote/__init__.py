"""Bytes of shards through fsspec, with a local cache and retries."""
