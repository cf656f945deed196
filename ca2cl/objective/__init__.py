"""NT-Xent, clusters, adversary: pure mathematics, no engine, no files."""
