"""Compare two sets of shards, and write what they share.

Legend: P pairs of tiles.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ca2cl import __version__
from ca2cl.common.files import check_writable, write_atomic, writing
from ca2cl.common.redact import redact
from ca2cl.data.fingerprints.survey import survey
from ca2cl.data.remote.reader import ShardReader, open_index
from ca2cl.doctor.leaks.pair_sheet import chosen, draw_pairs
from ca2cl.doctor.leaks.shared import Pair, SurveyedSet, find_pairs, regrouped, shared_slides, tiles_in
from ca2cl.runtime.device import find_device

logger = logging.getLogger(__name__)
_REMEDY = "give another folder with --leaks_output"
_NAMED = 20
_SHOWN = 5


def compare(roots: tuple[str, str], output: str, *, workers: int, cache_dir: str | None) -> int:
    """Print what two sets of shards share and write the pairs; returns 1 if there is anything, else 0.

    Args:
        roots: folders or URLs of the shards; the same one twice looks for copies within it.
        output: folder for what is written.
        workers: decoding processes.
        cache_dir: for remote shards.

    Raises:
        InputError: shards that cannot be read, or an output that cannot be written.
    """
    out = Path(output)
    check_writable(out / "leaks.json", "leaks_output")
    device = find_device("auto")
    a = _read(roots[0], workers, cache_dir)
    b = a if roots[0] == roots[1] else _read(roots[1], workers, cache_dir)
    slides = shared_slides(a, b) if a is not b else []
    pairs = find_pairs(a, b, device)
    _write(out, a, b, slides, pairs, cache_dir)
    sys.stdout.write("\n".join([*_text(a, b, slides, pairs), ""]))
    found = bool(slides or pairs)
    if found:
        sys.stdout.write(f"pairs, groups and a sheet of pairs are in {out}\n")
    sys.stdout.flush()
    return 1 if found else 0


def _read(root: str, workers: int, cache_dir: str | None) -> SurveyedSet:
    index = open_index(root, cache_dir)
    reader = ShardReader(root, cache_dir, index=index)
    tiles = survey(index, reader, workers=workers, title=f"doctor: read {redact(root)}")
    if tiles.bad:
        logger.warning("%s: %d tiles do not decode and are left out", redact(root), tiles.bad)
    return SurveyedSet(root, index, tiles)


def _text(a: SurveyedSet, b: SurveyedSet, slides: Sequence[str], pairs: Sequence[Pair]) -> list[str]:
    sides = [a] if a is b else [a, b]
    lines = [
        f"{letter}: {redact(side.root)}, {len(side.tiles)} tiles of {_slides(side)}"
        + (f"; {side.flat} without structure are not compared" if side.flat else "")
        for letter, side in zip("AB", sides, strict=False)
    ]
    if a is not b and a.index.manifest.digest == b.index.manifest.digest:
        lines.append("LEAK: A and B are the same shards")
    if slides:
        more = ", ..." if len(slides) > _SHOWN else ""
        lines.append(f"LEAK: A and B share {len(slides)} slides or patients ({', '.join(slides[:_SHOWN])}{more})")
    equal = [pair for pair in pairs if pair.equal]
    copies = [pair for pair in pairs if not pair.equal]
    whose = "A" if a is b else "B"
    for what, some in (("equal pixels", equal), ("altered copies", copies)):
        if some:
            names = ", ".join(b.keys[pair.b] for pair in some[:_SHOWN]) + (", ..." if len(some) > _SHOWN else "")
            lines.append(
                f"LEAK: {tiles_in(some, 'b')} of {len(b.tiles)} tiles of {whose} are in A as {what} ({names}), in "
                f"{len(some)} pairs"
            )
    return lines if slides or pairs else [*lines, "no slide and no tile in common"]


def _slides(side: SurveyedSet) -> str:
    known = {name for name in side.groups if name}
    return f"{len(known)} slides or patients" if known else "unknown slides"


def _write(
    out: Path, a: SurveyedSet, b: SurveyedSet, slides: Sequence[str], pairs: Sequence[Pair], cache_dir: str | None
) -> None:
    with writing(out, _REMEDY):
        out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "leaks.json", json.dumps(_content(a, b, slides, pairs), indent=1).encode(), _REMEDY)
    rows = [
        (
            a.keys[p.a],
            b.keys[p.b],
            a.groups[p.a] or "",
            b.groups[p.b] or "",
            f"{p.correlation:.4f}",
            int(p.equal),
            p.turn,
        )
        for p in pairs
    ]
    heads = ("key_a", "key_b", "group_a", "group_b", "correlation", "equal_pixels", "orientation")
    _write_csv(out / "pairs.csv", heads, rows)
    groups = regrouped(a, b, pairs)
    for name, mapping in zip(("groups-a.csv", "groups-b.csv"), groups[: 1 if a is b else 2], strict=False):
        _write_csv(out / name, ("key", "group"), sorted(mapping.items()))
    sheet = out / "pairs.png"
    with writing(sheet, _REMEDY):
        sheet.unlink(missing_ok=True)
    if pairs:
        draw_pairs(sheet, a, b, chosen([p for p in pairs if not p.equal] or pairs), cache_dir)


def _content(a: SurveyedSet, b: SurveyedSet, slides: Sequence[str], pairs: Sequence[Pair]) -> Mapping[str, Any]:
    equal = [pair for pair in pairs if pair.equal]
    return {
        "schema_version": 1,
        "ca2cl": __version__,
        "a": _described(a),
        "b": _described(b),
        "shared_slides": len(slides),
        "shared_slides_first": list(slides[:_NAMED]),
        "pairs": len(pairs),
        "pairs_of_equal_pixels": len(equal),
        "tiles_of_b_in_a": tiles_in(pairs, "b"),
        "tiles_of_a_in_b": tiles_in(pairs, "a"),
    }


def _described(side: SurveyedSet) -> dict[str, Any]:
    return {
        "shards": redact(side.root),
        "manifest_digest": side.index.manifest.digest,
        "tiles": len(side.tiles),
        "undecodable": side.tiles.bad,
        "without_structure": side.flat,
    }


def _write_csv(path: Path, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode(), _REMEDY)
