"""The readers of files from elsewhere, each with a good file and what is done with what it gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ca2cl.data.shards.index import INDEX_NAME, MANIFEST_NAME, ShardIndex, digest_of, read_manifest
from ca2cl.data.shards.samples import ShardInfo
from ca2cl.detection.coco.files import encode_mask, instance_ids, read_coco
from ca2cl.detection.engines.checkpoint import CARD, read_card
from ca2cl.models.encoder_io import read_card as read_encoder_card
from ca2cl.tracking.figures import columns_of
from ca2cl.tracking.journal import Journal, read_journal, training_lines
from ca2cl.tracking.replay import metrics_of
from ca2cl.tracking.run import read_run
from ca2cl.training.checkpoint import read_state
from ca2cl.training.loop import Progress
from tests.jobs.security.test_files import DETECTOR, ENCODER
from tests.support.mutants import raw
from tests.support.shards import encode, random_tiles, write_shards


@dataclass(frozen=True)
class Reader:
    """A file that is read: what a good one holds, how it is written, and what is done with it."""

    name: str
    valid: Any
    """JSON, or for the index and the journal what their files are made of."""
    read: Callable[[Path], object]
    write: Callable[[Path, Any], None] = lambda path, value: put(path, raw(value))


def put(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)  # the file before it may still be mapped
    path.write_bytes(data)


def _coco() -> dict[str, Any]:
    mask_HW = np.zeros((20, 30), bool)
    mask_HW[3:9, 4:20] = mask_HW[5, 6] = True
    rows = [
        {"segmentation": encode_mask(mask_HW), "iscrowd": 0, "instance_id": 3},
        {"segmentation": {"size": [20, 30], "counts": [100, 40, 460]}, "iscrowd": 0},
        {"segmentation": [[3, 3, 9, 3.5, 9, 9], [1, 1, 4, 1, 4, 4]], "iscrowd": 0},
    ]
    common = {"image_id": 1, "category_id": 1, "area": 96, "bbox": [4, 3, 16, 6]}
    return {
        "info": {"description": "x"},
        "images": [{"id": 1, "file_name": "a.png", "height": 20, "width": 30}],
        "annotations": [{"id": number, **common, **row} for number, row in enumerate(rows, start=1)],
        "categories": [{"id": 1, "name": "gland"}],
    }


def _use_coco(path: Path) -> None:
    data = read_coco(path)
    for image in data["images"]:
        instance_ids(image, data["annotations"])


LINES = [
    {"event": "status", "status": "RUNNING", "time": 1.5},
    {"step": 1, "loss": 0.5, "lr": 0.1, "time": 2.5, "bad_samples": 0},
    {"step": 2, "loss": None, "nonfinite": {"loss": "nan"}, "time": 3.5},
    {"event": "artifact", "path": "config.yaml", "to": "", "time": 4.5},
]


def write_journal(path: Path, lines: Any) -> None:
    put(path, b"".join(raw(line) + b"\n" for line in (lines if isinstance(lines, list) else [lines])))


def _use_journal(path: Path) -> None:
    records = [record for record, _ in read_journal(path)]
    for record in records:
        list(metrics_of(record))
    columns_of(list(training_lines(path)))
    journal = Journal(path)
    journal.rewind_to_step(1)
    journal.close()


def _write_index(path: Path, content: Any) -> None:
    """An index and a manifest that agree as far as what the index declares makes sense."""
    folder = path.parent
    schema = pa.ipc.open_file(pa.memory_map(str(folder / "good.arrow"))).schema
    batches = pa.ipc.open_file(pa.memory_map(str(folder / "good.arrow")))
    shards, sums = (content.get(name) for name in ("shards", "sums")) if isinstance(content, dict) else (content, 0)
    metadata = {**schema.metadata, b"ca2cl.shards": raw(shards), b"ca2cl.checksums": raw(sums)}
    path.unlink(missing_ok=True)
    with pa.ipc.new_file(str(path), schema.with_metadata(metadata)) as writer:
        for number in range(batches.num_record_batches):
            writer.write_batch(batches.get_batch(number))
    manifest = json.loads((folder / "good.json").read_text())
    try:
        infos = [ShardInfo(**shard) for shard in shards]
        manifest |= {"samples": sum(i.samples for i in infos), "bytes": sum(i.bytes for i in infos)}
        manifest |= {"shards": len(infos), "digest": digest_of(manifest["classes"], manifest["tile_size"], infos)}
        (folder / MANIFEST_NAME).write_bytes(raw(manifest))
    except (TypeError, ValueError, OverflowError):
        shutil.copyfile(folder / "good.json", folder / MANIFEST_NAME)


def _use_index(path: Path) -> None:
    index = ShardIndex(path.parent)
    len(index), index.labels(), index.groups()
    for samples in index:
        list(samples.key), list(samples.ext)
    for tar in path.parent.glob("*.tar"):
        tar.unlink()  # so that their sizes do not give away what is wrong before it is read


def _index_content(folder: Path) -> dict[str, Any]:
    write_shards(folder, [encode(tile) for tile in random_tiles(5)], per_shard=3)
    (folder / INDEX_NAME).rename(folder / "good.arrow")
    (folder / MANIFEST_NAME).rename(folder / "good.json")
    for tar in folder.glob("*.tar"):
        tar.unlink()
    metadata = pa.ipc.open_file(pa.memory_map(str(folder / "good.arrow"))).schema.metadata
    return {"shards": json.loads(metadata[b"ca2cl.shards"]), "sums": json.loads(metadata[b"ca2cl.checksums"])}


def make_readers(folder: Path) -> dict[str, Reader]:
    """All of them; the index's good file is made in ``folder``, which its reader is then used in."""
    optimizer = {"conv1.weight": {"step": 3.0}}
    best = {"loss": 0.5, "accuracy": 0.5, "epoch": 1, "waited": 0}
    state = {"schema_version": 1, "step": 3, "progress": {"step": 3, "bad_samples": 0}, "optimizer": optimizer}
    run = {"run_id": "0" * 32, "tracking_uri": "x", "experiment": "e", "created": 1.5, "params": {"a": "b"}}
    index = _index_content(folder)
    manifest = json.loads((folder / "good.json").read_text())
    return {
        "manifest": Reader(MANIFEST_NAME, manifest, read_manifest),
        "index": Reader(INDEX_NAME, index, _use_index, _write_index),
        "encoder card": Reader("card.json", asdict(ENCODER), read_encoder_card),
        "detector card": Reader(CARD, asdict(DETECTOR), lambda path: read_card(path.parent)),
        "journal": Reader("journal.jsonl", LINES, _use_journal, write_journal),
        "run": Reader("run.json", run, lambda path: read_run(path.parent)),
        "coco": Reader("coco.json", _coco(), _use_coco),
        "checkpoint": Reader(
            "state.json",
            {**state, "best": best, "scaler": None},
            lambda path: (read_state(path.parent), Progress.of(path.parent)),
        ),
    }
