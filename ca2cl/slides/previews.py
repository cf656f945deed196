"""Draw the slides of a job with their tissue and tiles."""

from __future__ import annotations

from pathlib import Path

from ca2cl.slides.records import SlideRecord
from ca2cl.slides.staging import Staging


def write_previews(path: Path, records: list[SlideRecord], staging: Staging) -> None:
    """Draw every slide that gave a picture into ``path``."""
    del path, records, staging
