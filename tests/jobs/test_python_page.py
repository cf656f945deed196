"""The snippets of docs/python.md, run as they are printed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from ca2cl.models.encoder_io import save_encoder
from ca2cl.registry.register import log_and_register
from ca2cl.registry.resolve import resolve_encoder
from ca2cl.store.open import open_store
from tests.support.shards import encode, random_tiles, write_shards

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
SIDE = 48


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory as the page takes it: a store with a champion, tiles, and shards."""
    monkeypatch.chdir(tmp_path)
    found = resolve_encoder("random")
    saved = save_encoder(tmp_path / "saved", found.encoder.state_dict(), replace(found.card, input_size=SIDE))
    store = open_store("", tmp_path / "ca2cl-runs")
    run_id = str(store.client.create_run(store.experiment_id("ca2cl")).info.run_id)
    assert log_and_register(run_id, saved, "ca2cl-encoder", store) == "1"
    store.client.set_registered_model_alias("ca2cl-encoder", "champion", "1")
    tiles = random_tiles(40, SIDE)
    write_shards(tmp_path / "shards" / "train", [encode(tile) for tile in tiles], tile_size=(SIDE, SIDE))
    (tmp_path / "tiles").mkdir()
    for name in ("tile.png", "tiles/a.png", "tiles/b.png"):
        Image.fromarray(tiles[0]).save(tmp_path / name)
    return tmp_path


def test_the_page_runs_from_top_to_bottom(folder: Path) -> None:
    assert len(SNIPPETS) == 4
    names: dict[str, object] = {}
    for snippet in SNIPPETS:
        exec(compile(snippet, str(PAGE), "exec"), names)  # noqa: S102 - the page's own text
    assert tuple(names["vectors"].shape) == (40, 512)  # type: ignore[attr-defined]
    assert float(names["loss"].detach()) > 0  # type: ignore[attr-defined]
