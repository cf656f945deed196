"""Features of the watched tiles; the network stays as it is.

Legend: B tiles of a block, N tiles, A tiles whose views are compared, D features, E embedding, S side of the input in
pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ca2cl.errors import InputError
from ca2cl.methods.base import Method
from ca2cl.models.preprocess import preprocess
from ca2cl.pretrain.watch.held_out import ROWS, Integers
from ca2cl.pretrain.watch.measures import squared_distances
from ca2cl.runtime.distributed import Ranks
from ca2cl.views.batch import Views

COMPARED = 4 * ROWS
"""Tiles whose two views are embedded for alignment: views cost a pass each, and their mean needs few."""


class Share(NamedTuple):
    """Features of some of the tiles.

    Attributes:
        places: of the tiles (N,).
        features: float32 (N, D).
        embeddings: what the loss compares, float32 (N, E); (N, 0) where the method has none.
        distances: squared distances (A,) between the views of the first ones.
    """

    places: Integers
    features: Tensor
    embeddings: Tensor
    distances: Tensor


class Passes:
    """Embeds blocks of tiles.

    Args:
        size: S.
        mean: of the input's channels, in [0, 1].
        std: of the channels.
        views: the run's recipe.
        words_N: a word for each tile of the watch.
        half: precision that passes are autocast to, as those of the training; None: fp32.
    """

    def __init__(
        self,
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        views: Views,
        words_N: Integers,
        half: torch.dtype | None = None,
    ) -> None:
        self._size, self._mean, self._std, self._views = size, mean, std, views
        self._words_N, self._half = words_N, half

    @torch.no_grad()
    def share(
        self,
        method: Method,
        network: nn.Module,
        blocks: Iterable[tuple[Integers, Tensor]],
        device: torch.device,
        compared: int = COMPARED,
    ) -> Share:
        """What the method's network makes of a rank's blocks, and of two views of the first ``compared`` tiles."""
        encoder, half = method.encoder(network), self._half
        found = []
        with (
            untouched(network, device),
            torch.autocast(device.type, half, enabled=half is not None, cache_enabled=False),
        ):
            for block, tiles_BHWC in blocks:
                if not len(block):
                    continue
                on_device = tiles_BHWC.to(device, non_blocking=True)
                features = encoder(preprocess(on_device, self._size, self._mean, self._std))
                embeddings = method.embeddings(network, features)
                embeddings = features[:, :0] if embeddings is None else embeddings
                near = block[0] < compared
                distances = self._compare(encoder, block, on_device) if near else torch.zeros(0, dtype=torch.float64)
                found.append(Share(block, features.float().cpu(), embeddings.float().cpu(), distances))
        return joined(found)

    def _compare(self, encoder: Callable[[Tensor], Tensor], block: Integers, tiles_BHWC: Tensor) -> Tensor:
        keys = torch.from_numpy(self._words_N[block])
        strong, weak = (x.contiguous(memory_format=torch.channels_last) for x in self._views(tiles_BHWC, keys, 0))
        return squared_distances(encoder(strong).float().cpu(), encoder(weak).float().cpu())


@contextmanager
def untouched(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards modes, buffers and random numbers are as before."""
    modes = [(module, module.training) for module in network.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            network.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def joined(parts: Sequence[Share]) -> Share:
    """Several shares as one, in the order of the tiles."""
    parts = [part for part in parts if len(part.places)]
    if not parts:
        none = torch.zeros(0, 0)
        return Share(np.zeros(0, np.int64), none, none, torch.zeros(0, dtype=torch.float64))
    places = np.concatenate([part.places for part in parts])
    order = np.argsort(places, kind="stable")
    features, embeddings = (
        torch.cat(rows)[torch.from_numpy(order)]
        for rows in ([part.features for part in parts], [part.embeddings for part in parts])
    )
    # sorted, so that the sum's order is not that of the ranks
    return Share(places[order], features, embeddings, torch.cat([part.distances for part in parts]).sort().values)


def gather(share: Share, ranks: Ranks) -> Share:
    """The shares of all ranks as one, on every rank.

    Raises:
        InputError: there are no tiles.
    """
    whole = joined([Share(*part) for part in ranks.share(tuple(share))])
    if not len(whole.places):
        raise InputError("watch.shards: none of the tiles could be decoded; check the shards with `ca2cl doctor`")
    return whole
