"""One page about a run: its curves, what its encoder holds alike, and what was measured with it."""
