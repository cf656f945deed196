"""What verbs show besides their results: progress, and the last lines."""
