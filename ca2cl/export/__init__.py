"""``ca2cl export``: an encoder as a file for another library, one module a format."""
