"""Parts of ``ca2cl report`` that show tiles at their places on slides."""
