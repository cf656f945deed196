"""Features, probes, floors and metrics: what an encoder is worth, and how sure that is."""
