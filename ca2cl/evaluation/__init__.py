"""Parts that evaluation verbs share: splits, metrics, statistics, leakage and reports."""
