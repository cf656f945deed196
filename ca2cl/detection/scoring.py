"""Import path of ``scores.scoring`` before the folders were made."""

from ca2cl.detection.scores.scoring import score_split

__all__ = ["score_split"]
