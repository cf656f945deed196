"""Sample, embed and thumbnail the tiles that a page shows.

Legend: N tiles of the page, B tiles of a batch, D features, T side of a thumbnail in pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from ca2cl.data.loading.sequential import iterate_tiles
from ca2cl.data.loading.stream import BadTile
from ca2cl.data.remote.reader import ShardReader
from ca2cl.data.shards.index import ShardIndex
from ca2cl.evaluation.features import Batches, centred, colour_histogram, extract, frozen
from ca2cl.evaluation.leaks.pretraining import compare_seen
from ca2cl.evaluation.leaks.wording import of_pretraining
from ca2cl.evaluation.result import ENCODER
from ca2cl.evaluation.splits import stratified_sample
from ca2cl.registry.resolve import ResolvedEncoder
from ca2cl.report.places.tile_places import Places, read_places

logger = logging.getLogger(__name__)
THUMB = 96
_BATCH = 64
_COLOURS = "colours"
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Tiles:
    """The tiles of a page, in the order of their shards' index."""

    digest: str
    """Of the shards' manifest."""
    held: int
    """Tiles in the shards."""
    classes: list[str]
    features_ND: npt.NDArray[np.float64]
    """Less the mean of these tiles and of unit length, so that a product is a cosine; a tile that equals the mean is
    zero."""
    colours_ND: npt.NDArray[np.float64]
    """Colour histograms, likewise."""
    labels_N: npt.NDArray[np.int64]
    """-1 where unlabelled."""
    keys: list[str]
    thumbs_NTTC: Pixels
    bad: list[BadTile]
    """Tiles that were drawn and did not decode."""
    seen: list[str]
    """Warnings about tiles that the encoder was trained on."""
    places: Places | None = None
    """On their slides; None where no tile has one."""

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def labelled(self) -> bool:
        """True if any tile has a label."""
        return bool((self.labels_N >= 0).any())

    def name(self, row: int) -> str:
        """Class of a tile, or that it has none."""
        label = int(self.labels_N[row])
        return self.classes[label] if label >= 0 else "unlabelled"


def read_tiles(
    found: ResolvedEncoder,
    root: str,
    index: ShardIndex,
    *,
    count: int,
    seed: int,
    device: torch.device,
    workers: int,
    cache_dir: str | None,
    test: bool = False,
) -> Tiles:
    """Draw at most ``count`` tiles, every class with its share, and embed them with the encoder at its own size.

    Args:
        found: the encoder.
        root: folder or URL of the shards.
        index: theirs.
        count: most tiles.
        seed: of the draw.
        device: where they are embedded.
        workers: decoding processes.
        cache_dir: for remote shards.
        test: they are shown as tiles that the encoder has not seen, so look for those that it has.

    Raises:
        InputError: none of them decodes, or a shard cannot be read.
    """
    samples = stratified_sample(index.labels(), count, seed)
    bad: list[BadTile] = []
    thumbs: list[Pixels] = []
    reader = ShardReader(root, cache_dir, index=index)
    batches = iterate_tiles(index, reader, samples, batch_size=_BATCH, workers=workers, on_bad=bad.append)
    card = found.card
    extractor = frozen(found.encoder.to(device), card.input_size, card.mean, card.std)
    extractors = {ENCODER: extractor, _COLOURS: colour_histogram}
    made = extract(_seen(batches, thumbs), extractors, total=len(samples), device=device, title=root)
    # in double precision, so that neighbours of nearly equal cosine keep their order
    values = {name: centred(made.values[name].astype(np.float64))[0] for name in extractors}
    places = [index.locate(int(sample)) for sample in made.samples_N]
    keys = [str(index.samples(shard).key[row]) for shard, row in places]
    seen = []
    if test:
        groups = [index.samples(shard).group[row] for shard, row in places]
        part = compare_seen(found, groups, made.pixels_N, made.fingerprints_ND, keys.__getitem__)
        seen = of_pretraining("the encoder", part, f" of {len(keys)} tiles of the page", "the test set")
    for line in seen:
        logger.warning("LEAK: %s", line)
    return Tiles(
        digest=index.manifest.digest,
        held=len(index),
        classes=index.classes,
        features_ND=np.asarray(values[ENCODER], np.float64),
        colours_ND=np.asarray(values[_COLOURS], np.float64),
        labels_N=made.labels_N,
        keys=keys,
        thumbs_NTTC=np.stack(thumbs),
        bad=bad,
        seen=seen,
        places=read_places(index, reader, places),
    )


def _seen(batches: Batches, thumbs: list[Pixels]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The batches as they are; a thumbnail of every tile goes to ``thumbs``: pixels do not outlive their batch."""
    for batch in batches:
        thumbs.extend(thumbnail(tile_HWC) for tile_HWC in batch[0].numpy())
        yield batch


def thumbnail(tile_HWC: Pixels) -> Pixels:
    """The tile at ``THUMB`` pixels a side, as the encoder sees it: the whole of it, made square."""
    small = Image.fromarray(tile_HWC).resize((THUMB, THUMB), Image.Resampling.LANCZOS)
    return np.asarray(small, np.uint8)
