"""``ca2cl embed``: a file of feature vectors, written in resumable parts."""
