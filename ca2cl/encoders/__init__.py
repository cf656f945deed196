"""``ca2cl encoders list | show | compare | promote | import``."""
