"""Parts that evaluation verbs share: splits, metrics, statistics and reports."""
