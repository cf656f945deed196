"""Find tiles, slides or patients that a test set shares with training.

One search for every verb that scores. What it finds is named in the log, stands under the table (``lines``), in the
JSON, and in MLflow's tag ``ca2cl.leak`` (``tag``); runs with that tag promote no encoder (``tracking.downstream``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ca2cl.data.loading.sequential import iterate_tiles
from ca2cl.data.remote.reader import ShardReader
from ca2cl.data.shards.index import ShardIndex
from ca2cl.evaluation.features import extract
from ca2cl.models.encoder_io import EncoderCard
from ca2cl.registry.evaluation_run import LEAK_TAG, TRAINED_ON_TEST

logger = logging.getLogger(__name__)
Leak = dict[str, Any]
_NAMED = 20
_WARNING = "these scores say little about new"


@dataclass(frozen=True)
class Side:
    """One side of a comparison: its tiles, with the slide or patient and a digest of the pixels of each."""

    digest: str
    """Of the manifest."""
    keys: Iterable[str]
    """Of all tiles, also those without a label."""
    samples: Sequence[int]
    groups: Sequence[str | None]
    pixels: Sequence[bytes]

    @classmethod
    def of(cls, index: ShardIndex, samples: Sequence[int], pixels: Sequence[bytes]) -> Side:
        """Some samples of an index, in any order."""
        groups = index.groups()
        keys = (key for shard in index for key in shard.key)
        return cls(index.manifest.digest, keys, samples, [groups[sample] for sample in samples], pixels)


def side_of(index: ShardIndex, reader: ShardReader, title: str, *, workers: int) -> Side:
    """All labelled tiles of some shards that decode, read once for their pixels' digests.

    Args:
        index: of the shards.
        reader: of the shards.
        title: for the progress bar.
        workers: decoding processes.

    Raises:
        InputError: none decodes.
    """
    samples = np.flatnonzero(index.labels() >= 0)
    batches = iterate_tiles(index, reader, samples, workers=workers, on_bad=lambda tile: None)
    tiles = extract(batches, {}, total=len(samples), device=torch.device("cpu"), title=f"leaks: {title}")
    return Side.of(index, tiles.samples_N.tolist(), tiles.pixels_N)


def find_leak(
    train: Side, test: Side, *, name: str = "", encoders: Mapping[str, EncoderCard] | None = None, what: str = "tiles"
) -> Leak:
    """Find what a test set shares with the training set and with the encoders' own training data; warn if anything.

    Equal keys alone may be two tiles with one name; equal pixels are one tile, whatever its name. Slides are compared
    by name, where both sides know them.

    Args:
        name: of the test set, where there are several.
        encoders: cards of what is compared, by the name in the table.
        what: tiles or images.
    """
    train_keys = set(train.keys)
    keys = sorted(key for key in test.keys if key in train_keys)
    pixels = set(train.pixels)
    equal = [int(s) for s, p in zip(test.samples, test.pixels, strict=True) if p in pixels]
    shared = {group for group in train.groups if group is not None} & set(test.groups)
    slides = sorted(group for group in shared if group is not None)
    leak = {
        "same_manifest": train.digest == test.digest,
        "what": what,
        "test_tiles": len(test.samples),
        "shared_keys": len(keys),
        "shared_keys_first": keys[:_NAMED],
        "equal_test_tiles": len(equal),
        "equal_test_tiles_first": equal[:_NAMED],
        "shared_slides": len(slides),
        "shared_slides_first": slides[:_NAMED],
        "test_tiles_of_shared_slides": sum(group in shared for group in test.groups),
        "trained_on_test": trained_on(encoders or {}, test.digest),
    }
    found = lines(leak, name)
    for line in found:
        logger.warning("%s", line)
    if keys and not found:
        shared_keys = f"{len(keys)} keys of {name}" if name else f"{len(keys)} keys"
        logger.warning(
            "possible LEAK: %s are in train and in test (%s is one), though no tile is equal pixel by pixel",
            shared_keys, keys[0],
        )  # fmt: skip
    return leak


def trained_on(encoders: Mapping[str, EncoderCard], digest: str) -> list[str]:
    """Those of the encoders that were trained on the shards with this digest, whether with labels or without."""
    return [title for title, card in encoders.items() if digest in card.manifests]


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
        first = ", ".join(leak["shared_slides_first"][:3]) + (", ..." if leak["shared_slides"] > 3 else "")
        found.append(
            f"train and test{of} share {leak['shared_slides']} slides or patients ({first}), those of "
            f"{leak['test_tiles_of_shared_slides']}{total} test {what}"
        )
    if leak.get("trained_on_test"):
        found.append(f"the test shards{of} are training data of {', '.join(leak['trained_on_test'])}, by their digest")
    return [f"LEAK: {line}; {_WARNING} {what}" for line in found]


def tag(leak: Mapping[str, Any], encoder: str) -> dict[str, str]:
    """MLflow's tag for a run whose scores of ``encoder`` say little about new tiles; nothing for others."""
    kinds = []
    if leak.get("same_manifest") or leak.get("equal_test_tiles"):
        kinds.append("shared tiles")
    elif leak.get("shared_slides"):
        kinds.append("shared slides")
    if encoder in leak.get("trained_on_test", ()):
        kinds.append(TRAINED_ON_TEST)
    return {LEAK_TAG: ", ".join(kinds)} if kinds else {}
