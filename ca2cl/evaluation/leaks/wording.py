"""Lines, notes and MLflow tag of what a comparison found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ca2cl.common.tables import short
from ca2cl.registry.evaluation_run import LEAK_TAG, TRAINED_ON_SLIDES, TRAINED_ON_TEST, TRAINED_ON_TILES

Leak = dict[str, Any]
NAMED = 20
"""Names that are kept of each kind."""
_SHOWN = 3
_WARNING = "these scores say little about new"


def lines(leak: Mapping[str, Any], name: str = "") -> list[str]:
    """Warnings to print beside the scores, one line each; an earlier version's findings have fewer fields."""
    of = f" of {name}" if name else ""
    total = f" of {leak['test_tiles']}" if "test_tiles" in leak else ""
    what = leak.get("what", "tiles")
    found = []
    if leak.get("same_manifest") or leak.get("equal_test_tiles"):
        same = " (train and test are the same shards)" if leak.get("same_manifest") else ""
        found.append(f"{leak.get('equal_test_tiles', 'all')}{total} test {what}{of} are training {what} too{same}")
    elif leak.get("shared_slides"):
        found.append(
            f"train and test{of} share {leak['shared_slides']} slides or patients "
            f"({_first(leak['shared_slides_first'], leak['shared_slides'])}), those of "
            f"{leak['test_tiles_of_shared_slides']}{total} test {what}"
        )
    if leak.get("trained_on_test"):
        found.append(f"the test shards{of} are training data of {', '.join(leak['trained_on_test'])}, by their digest")
    for encoder, part in leak.get("pretraining", {}).items():
        if encoder not in leak.get("trained_on_test", ()):
            found += of_pretraining(encoder, part, f"{total} test {what}{of}", f"the test set{of}", what)
    return [f"LEAK: {line}; {_WARNING} {what}" for line in found]


def of_pretraining(encoder: str, part: Mapping[str, Any], tiles: str, whose: str, what: str = "tiles") -> list[str]:
    """What ``pretraining.compare_seen`` found, in words.

    Args:
        encoder: its name.
        part: what was found.
        tiles: " of 200 test tiles".
        whose: "the test set".
        what: tiles or images.
    """
    found = []
    if part.get("slides"):
        found.append(
            f"{encoder} was trained on {part['slides']} slides or patients of {whose} "
            f"({_first(part['slides_first'], part['slides'])}), those of {part['test_tiles_of_slides']}{tiles}"
        )
    if count := seen_tiles(part):
        copies = f", {part['copied_test_tiles']} of them as altered copies" if part["copied_test_tiles"] else ""
        sample = ""
        if part["compared_tiles"] < part["seen_tiles"]:
            sample = f", of a sample of {part['compared_tiles']} of its {part['seen_tiles']} training {what}"
        found.append(
            f"{encoder} was trained on {count}{tiles} ({_first(part['test_tiles_first'], count)}){copies}{sample}"
        )
    return found


def seen_tiles(part: Mapping[str, Any]) -> int:
    """Number of test tiles that an encoder has seen, as they are or as altered copies."""
    return int(part.get("equal_test_tiles", 0)) + int(part.get("copied_test_tiles", 0))


def notes(leak: Mapping[str, Any]) -> list[str]:
    """A line for each encoder of whose training data only the manifest is known."""
    return [
        f"not known which slides and tiles {encoder} has seen of shards "
        f"{', '.join(map(short, part['unknown_manifests']))}, which no seen.safetensors beside it covers (earlier "
        "versions wrote none); only equal shards are found"
        for encoder, part in leak.get("pretraining", {}).items()
        if part.get("unknown_manifests")
    ]


def tag(leak: Mapping[str, Any], encoder: str) -> dict[str, str]:
    """MLflow's tag for a run whose scores of ``encoder`` say little about new tiles; nothing for others."""
    kinds = []
    if leak.get("same_manifest") or leak.get("equal_test_tiles"):
        kinds.append("shared tiles")
    elif leak.get("shared_slides"):
        kinds.append("shared slides")
    part = leak.get("pretraining", {}).get(encoder, {})
    if encoder in leak.get("trained_on_test", ()):
        kinds.append(TRAINED_ON_TEST)
    elif seen_tiles(part):
        kinds.append(TRAINED_ON_TILES)
    elif part.get("slides"):
        kinds.append(TRAINED_ON_SLIDES)
    return {LEAK_TAG: ", ".join(kinds)} if kinds else {}


def _first(names: list[str], total: int) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if total > _SHOWN else "")
