"""``ca2cl probe``: classifiers on frozen features, with baselines."""
