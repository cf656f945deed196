"""Draw, download or find the published sets, and shard them."""

from __future__ import annotations

from pathlib import Path

from ca2cl.common.files import write_atomic, writing
from ca2cl.common.job_dir import REMEDY, JobDir
from ca2cl.data.shards.config import ShardConfig
from ca2cl.data.shards.index import MANIFEST_NAME
from ca2cl.data.shards.run import run as run_shard
from ca2cl.data.synthetic.tissue import write_tissue
from ca2cl.errors import InputError
from ca2cl.reproduce.archives import Archive, check_space, choose, download, part_of, read_record
from ca2cl.reproduce.config import RECORD_URL, TEST_SET, NctConfig
from ca2cl.reproduce.unpack import unpack

MADE_UP = "MADE-UP-TISSUE.txt"
"""Says of a data folder that its tiles were drawn."""
_MADE_UP_TEXT = b"Drawn by `ca2cl reproduce nct --miniature`: no tissue, and no result of it means anything.\n"
DRAWN = {"train": (40, 0), "test": (20, 1)}  # tiles a class, and seed
_DRAWN_SIZE = 64
_UNPACKED = 1.35
"""Bytes of the tiles for a byte of their archive, a little above what it is."""
MD5 = {
    "NCT-CRC-HE-100K.zip": "6fd702d11df6292bc054397ae038a464",
    "NCT-CRC-HE-100K-NONORM.zip": "035777cf327776a71a05c95da6d6325f",
    "CRC-VAL-HE-7K.zip": "2fd1651b4f94ebd818ebf90ad2b6ce06",
}
"""As many who use these sets state them: what zenodo.org itself says is held against them."""


def present(data: Path, name: str) -> bool:
    """True if a set's folder is there."""
    return (data / name).is_dir()


def made_up(data: Path) -> bool:
    """True if the tiles in ``data`` were drawn."""
    return (data / MADE_UP).exists()


def archive_path(data: Path, name: str) -> Path:
    """Path of a set's archive."""
    return data / f"{name}.zip"


def check_present(config: NctConfig) -> None:
    """Raise ``InputError`` where a set is neither there nor to be made."""
    data = Path(config.data)
    missing = [name for name in config.sets if not present(data, name)]
    if config.miniature:
        if len(missing) < 2 and not made_up(data):
            raise InputError(f"data is {config.data!r}: holds tiles that were not drawn; give an empty folder")
    elif missing and not config.download:
        archive = archive_path(data, missing[0])
        there = f", though its archive {archive} is" if archive.exists() else ""
        raise InputError(f"{data / missing[0]}: not there{there}; give the folder that holds it as data, or use "
                         "--download")  # fmt: skip


def provide(config: NctConfig) -> None:
    """Draw or fetch the sets that are not there. What is there is left as it is.

    Raises:
        InputError: as ``check_present``, or they cannot be fetched or written.
    """
    check_present(config)
    data = Path(config.data)
    missing = [name for name in config.sets if not present(data, name)]
    if not missing:
        return
    with JobDir(data).locked(0.0):
        if config.miniature:
            _draw(config, data)
        else:
            _fetch(config, data, missing)


def _draw(config: NctConfig, data: Path) -> None:
    write_atomic(data / MADE_UP, _MADE_UP_TEXT, REMEDY)  # first: what is drawn must never pass for tissue
    with writing(data, REMEDY):
        for name in config.sets:
            if not present(data, name):
                count, seed = DRAWN["test" if name == TEST_SET else "train"]
                write_tissue(data / name, count, size=_DRAWN_SIZE, seed=seed, suffix=".tif")


def _fetch(config: NctConfig, data: Path, missing: list[str]) -> None:
    known = MD5 if config.record_url == RECORD_URL else {}
    record = read_record(config.record_url)
    archives = [choose(record, archive_path(data, name).name, config.record_url, known) for name in missing]
    check_space(data, sum(_to_come(archive, data) for archive in archives), f"downloading {' and '.join(missing)}")
    for name, archive in zip(missing, archives, strict=True):
        download(archive, archive_path(data, name))
        unpack(archive_path(data, name), data / name)


def _to_come(archive: Archive, data: Path) -> int:
    """Bytes that an archive and its tiles will still take."""
    target = data / archive.name
    here = max((path.stat().st_size for path in (target, part_of(target)) if path.exists()), default=0)
    return max(0, archive.size - here) + int(_UNPACKED * archive.size)


def sharded(config: NctConfig, name: str) -> bool:
    """True if a set's shards are complete."""
    return (config.shards(name) / MANIFEST_NAME).exists()


def make_shards(config: NctConfig) -> None:
    """Shard the sets that are not sharded.

    Raises:
        InputError: tiles that do not decode or differ in size; a full disk.
    """
    for name in config.sets:
        if not sharded(config, name):
            source = str(Path(config.data) / name)
            run_shard(ShardConfig(source=source, out=str(config.shards(name)), workers=max(1, config.workers)))
