"""``ca2cl reproduce``: the authors' published tables beside ours."""
