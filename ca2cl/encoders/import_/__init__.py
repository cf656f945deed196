"""``ca2cl encoders import``: register an encoder from elsewhere."""
