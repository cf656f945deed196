"""Downloads of remote files through fsspec."""
