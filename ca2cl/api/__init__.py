"""Names for notebooks and other trainers, which ``import ca2cl`` offers."""
