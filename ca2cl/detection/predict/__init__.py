"""``ca2cl detect predict``: a detector's instances on a folder of images."""
