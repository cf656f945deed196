"""``embed``: tiles to feature vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from ca2cl.api.encoder import Encoder, as_pixels, load_encoder
from ca2cl.api.shard_dataset import ShardDataset
from ca2cl.data.decode import BadSample, decode
from ca2cl.data.loading.sequential import iterate_tiles
from ca2cl.data.loading.stream import BadTile
from ca2cl.errors import InputError


def embed(
    tiles: Any,
    encoder: Encoder | str,
    *,
    batch_size: int = 256,
    progress: bool | None = None,
) -> npt.NDArray[np.float32]:
    """Features of tiles, float32 (N, D), in the order of the tiles.

    They are those of ``ca2cl embed``. The encoder runs in ``eval()`` mode, without gradients, on the device of its
    weights; its own mode is restored.

    Args:
        tiles: uint8 RGB in [0, 255], (N, H, W, 3) or (N, 3, H, W), as array or tensor; a ``ShardDataset``, whose
            transform is not applied; or a list of PIL images, arrays (H, W, 3) or paths of image files, which may
            differ in size.
        encoder: what ``load_encoder`` returns, or what it takes.
        batch_size: tiles in a forward pass.
        progress: whether to show a progress bar; None shows one on a terminal.

    Raises:
        ValueError: another dtype or shape, no tiles, or a tile that does not decode.

    Example:
        >>> vectors = ca2cl.embed(sorted(pathlib.Path("tiles").glob("*.png")), "champion")
    """
    if not isinstance(encoder, Encoder):
        encoder = load_encoder(encoder)
    if not len(tiles):
        raise ValueError("tiles is empty: give at least one tile")
    if isinstance(tiles, Sequence) and isinstance(tiles[0], (str, Path)):
        for path in tiles:
            if not Path(path).is_file():
                raise InputError(f"{path}: no such file")
    device = next(encoder.parameters()).device
    training = encoder.training
    encoder.eval()
    found: list[Tensor] = []
    try:
        with (
            torch.inference_mode(),
            tqdm(
                total=len(tiles), desc="embed", unit="tile", disable=None if progress is None else not progress
            ) as bar,
        ):
            for batch in _batches(tiles, encoder, batch_size, device):
                found.append(encoder(batch).float().cpu())
                bar.update(len(batch))
    finally:
        encoder.train(training)
    return np.asarray(torch.cat(found).numpy(), np.float32)


def _batches(tiles: Any, encoder: Encoder, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """Normalised batches on the device."""
    if isinstance(tiles, ShardDataset):
        batches = iterate_tiles(tiles.index, tiles.reader, batch_size=batch_size, on_bad=_refuse)
        yield from (encoder.transform(pixels.to(device)) for pixels, _, _ in batches)
        return
    whole = as_pixels(tiles) if isinstance(tiles, (np.ndarray, Tensor)) else None
    if whole is not None and whole.ndim != 4:
        raise ValueError(f"tiles are {tuple(whole.shape)}: give a batch, (N, H, W, 3)")
    for first in range(0, len(tiles), batch_size):
        if whole is not None:
            yield encoder.transform(whole[first : first + batch_size].to(device))
        else:
            batch = [encoder.transform(_read(tile)) for tile in tiles[first : first + batch_size]]
            yield torch.stack(batch).to(device)


def _read(tile: Any) -> Any:
    """The pixels of a path; anything else as it is."""
    if not isinstance(tile, (str, Path)):
        return tile
    try:
        return decode(Path(tile).read_bytes())
    except (BadSample, OSError) as error:
        raise InputError(f"{tile}: {error}") from None


def _refuse(tile: BadTile) -> None:
    """Left out, it would shift the rows behind it."""
    raise InputError(f"tile {tile.key}: {tile.reason}")
