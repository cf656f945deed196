"""Find tiles, slides or patients that a test set shares with training.

One search for every verb that scores. What it finds is named in the log, stands under the table (``lines``), in the
JSON, and in MLflow's tag ``ca2cl.leak`` (``tag``); runs with that tag promote no encoder (``registry.downstream``).

Legend: N tiles of a side, D length of a fingerprint.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ca2cl.data.fingerprints.seen import Fingerprints, fingerprints_of
from ca2cl.data.fingerprints.survey import survey
from ca2cl.data.remote.reader import ShardReader
from ca2cl.data.shards.index import ShardIndex
from ca2cl.errors import InputError
from ca2cl.evaluation.leaks.pretraining import Pretrained, compare_seen, trained_on
from ca2cl.evaluation.leaks.wording import NAMED, Leak, lines, notes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Side:
    """One side of a comparison: its tiles, with the slide or patient and a digest of the pixels of each."""

    digest: str
    """Of the manifest."""
    keys: Sequence[str]
    """Of all tiles by sample number, also those without a label; empty where they mean nothing."""
    samples: Sequence[int]
    groups: Sequence[str | None]
    pixels: Sequence[bytes]
    fingerprints_ND: Fingerprints | None = None
    """Of the tiles, where they were made."""

    @classmethod
    def of(
        cls,
        index: ShardIndex,
        samples: Sequence[int],
        pixels: Sequence[bytes],
        fingerprints: Fingerprints | None = None,
    ) -> Side:
        """Some samples of an index, in any order."""
        groups = index.groups()
        keys = [key for shard in index for key in shard.key]
        of_samples = [groups[sample] for sample in samples]
        return cls(index.manifest.digest, keys, samples, of_samples, pixels, fingerprints)

    def name(self, row: int) -> str:
        """Key of a tile, or its number where there are no keys."""
        sample = self.samples[row]
        return self.keys[sample] if sample < len(self.keys) else str(sample)


def side_of(index: ShardIndex, reader: ShardReader, title: str, *, workers: int) -> Side:
    """All labelled tiles of some shards that decode, read once for their digests and fingerprints.

    Args:
        index: of the shards.
        reader: of the shards.
        title: for the progress bar.
        workers: decoding processes.

    Raises:
        InputError: none decodes.
    """
    labelled = np.flatnonzero(index.labels() >= 0)
    tiles = survey(index, reader, labelled, workers=workers, title=f"leaks: {title}")
    if not len(tiles):
        raise InputError(
            f"{title}: none of {len(labelled)} tiles could be decoded; check the shards with `ca2cl doctor`"
        )
    return Side.of(index, tiles.samples_N.tolist(), tiles.pixels_N, fingerprints_of(tiles.thumbnails_NSS))


def find_leak(
    train: Side, test: Side, *, name: str = "", encoders: Mapping[str, Pretrained] | None = None, what: str = "tiles"
) -> Leak:
    """Find what a test set shares with the training set and with the encoders' own training data; warn if anything.

    Equal keys alone may be two tiles with one name; equal pixels are one tile, whatever its name. Slides are compared
    by name, where both sides know them.

    Args:
        train: the labelled tiles.
        test: the tiles that are scored.
        name: of the test set, where there are several.
        encoders: what is compared, by the name in the table.
        what: tiles or images.
    """
    train_keys = set(train.keys)
    keys = sorted(key for key in test.keys if key in train_keys)
    pixels = set(train.pixels)
    equal = [int(s) for s, p in zip(test.samples, test.pixels, strict=True) if p in pixels]
    shared = {group for group in train.groups if group is not None} & set(test.groups)
    slides = sorted(group for group in shared if group is not None)
    encoders = encoders or {}
    leak = {
        "same_manifest": train.digest == test.digest,
        "what": what,
        "test_tiles": len(test.samples),
        "shared_keys": len(keys),
        "shared_keys_first": keys[:NAMED],
        "equal_test_tiles": len(equal),
        "equal_test_tiles_first": equal[:NAMED],
        "shared_slides": len(slides),
        "shared_slides_first": slides[:NAMED],
        "test_tiles_of_shared_slides": sum(group in shared for group in test.groups),
        "trained_on_test": trained_on(encoders, test.digest),
        "pretraining": {
            title: compare_seen(
                found, test.groups, test.pixels, test.fingerprints_ND, test.name, known=(train.digest, test.digest)
            )
            for title, found in encoders.items()
        },
    }
    found = lines(leak, name)
    for line in (*found, *notes(leak)):
        logger.warning("%s", line)
    if keys and not found:
        shared_keys = f"{len(keys)} keys of {name}" if name else f"{len(keys)} keys"
        logger.warning(
            "possible LEAK: %s are in train and in test (%s is one), though no tile is equal pixel by pixel; "
            "`ca2cl doctor --leaks TRAIN TEST` shows altered copies, if any; equal names alone may be numbering",
            shared_keys, keys[0],
        )  # fmt: skip
    return leak
