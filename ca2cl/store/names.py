"""Valid names of runs and encoders, and run ids by prefix."""

from __future__ import annotations

import re

from ca2cl.errors import InputError
from ca2cl.store.open import Store, all_pages, store_errors

RUN_ID = re.compile(r"[0-9a-f]{32}")
MODEL = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?P<version>[^/@]+)|@(?P<alias>[^/@]+))")
WORD = re.compile(r"[\w-]+")
"""A version's number, an alias or a shortened run id, none of which looks like a path."""
_SHORT = re.compile(r"[0-9a-f]{6,31}")
_LISTED = 5


def is_stored(source: str) -> bool:
    """True if ``source`` can only name something in a tracking store, never a path."""
    return bool(RUN_ID.fullmatch(source)) or source.startswith(("runs:/", "models:/"))


def full_run_id(store: Store, named: str) -> str | None:
    """The id of the run ``named``: an id, ``runs:/ID``, or an id's first digits; None where no run has such an id.

    A whole id is not looked up, and neither is a text after ``runs:/`` that is not the beginning of an id.

    Raises:
        InputError: the digits fit several runs, or the store cannot be reached.
    """
    digits = named.removeprefix("runs:/").partition("/")[0]
    if not _SHORT.fullmatch(digits):
        return digits if RUN_ID.fullmatch(digits) or named.startswith("runs:/") else None
    with store_errors(store.uri):
        experiments = [one.experiment_id for one in all_pages(store.client.search_experiments)]
        wanted = f"attributes.run_id LIKE '{digits}%'"
        found = store.client.search_runs(experiments, wanted, max_results=_LISTED + 1)
    ids = sorted(str(run.info.run_id) for run in found)
    if len(ids) > 1:
        listed = ", ".join(ids[:_LISTED]) + (", ..." if len(ids) > _LISTED else "")
        raise InputError(f"run {digits!r}: fits several runs ({listed}); give more digits")
    return ids[0] if ids else digits if named.startswith("runs:/") else None
