"""``ca2cl detect``: detectors trained from encoders, seed by seed, and compared."""
