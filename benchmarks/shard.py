"""``ca2cl shard`` of this checkout against that of another one, in turn.

    git worktree add ../before f1aef52
    python -m benchmarks.shard ../before [--folder TILES] [--tiles 4000] [--workers 1 2] [--repeats 5]

Both write shards of the same folder, and must write the same digest. CPU seconds are those of all processes together.
``start`` is the same command on a folder of eight tiles: imports, index and manifest; ``a tile`` is the rest.
"""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from benchmarks.checkouts import HERE, Cost, in_turn, python, run, table
from benchmarks.loader import write_tiles

_FEW = 8


def compare(folder: Path, few: Path, before: Path, scratch: Path, *, workers: int, repeats: int, name: str) -> None:
    """Shard ``folder`` and ``few`` with both checkouts, and print the table.

    Raises:
        SystemExit: they write different shards.
    """
    digests: set[str] = set()
    tiles = sum(path.is_file() for path in folder.rglob("*"))

    def measured(_name: str, checkout: Path) -> Mapping[str, Cost]:
        costs = []
        for source in (few, folder):
            out = scratch / "out"
            shutil.rmtree(out, ignore_errors=True)
            words = ("-m", "ca2cl", "shard", str(source), str(out), "--workers", str(workers))
            cost, text = run(python(*words), checkout, scratch)
            costs.append(cost)
        digests.update(re.findall(r"digest +(\w+)", text))
        start, whole = costs
        rest = Cost(whole.cpu - start.cpu, whole.wall - start.wall)
        return {"start": start, f"the rest, of {tiles} tiles": rest, "all": whole}

    found = in_turn({"before": before, "after": HERE}, measured, repeats)
    if len(digests) != 1:
        raise SystemExit(f"the checkouts write different shards: {digests}")
    print(table(f"{name}, {workers} process(es)", found), flush=True)


def main() -> None:
    """Make or take the tiles, and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("before", type=Path, help="checkout to compare with")
    parser.add_argument("--folder", type=Path, help="tree of class folders with tiles of one size; none makes them up")
    parser.add_argument("--tiles", type=int, default=4000, help="made-up tiles of each format")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="writing processes")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each checkout")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        made = {kind: root / kind for kind in ("jpg", "tif")}
        folders = {settings.folder.name: settings.folder} if settings.folder else made
        few = write_tiles(root / "few", "jpg", _FEW)
        for name, folder in folders.items():
            if not settings.folder:
                write_tiles(folder, name, settings.tiles)
            for workers in settings.workers:
                compare(
                    folder, few, settings.before, root, workers=workers, repeats=settings.repeats,
                    name=f"224 px {name}" if not settings.folder else name,
                )  # fmt: skip


if __name__ == "__main__":
    main()
