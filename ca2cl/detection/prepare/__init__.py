"""``ca2cl detect prepare``: images with instance masks to COCO files."""
