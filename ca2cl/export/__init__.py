"""``ca2cl export``: encoders for other libraries, one module a format."""
