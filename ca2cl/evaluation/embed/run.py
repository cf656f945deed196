"""``ca2cl embed``: feature vectors of tiles as Parquet or safetensors.

Tiles are cut into parts of a fixed size. The processes of a launch share out the parts that are not finished, and the
first joins them. Batches never reach over a part, so which tiles go through the encoder together, and with it the last
bit of a vector, depends on ``part_size`` and ``batch_size`` and not on how many processes or attempts there were.

No MLflow run is made of it: vectors are data and not a score, and whom they come from stands in the file itself, which
so needs no store to be understood and none to be written.
"""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from ca2cl.common.console.summary import closing
from ca2cl.common.files import remove_temporaries
from ca2cl.common.job_dir import changed, listed
from ca2cl.errors import InputError, LocalError
from ca2cl.evaluation.embed.config import EmbedConfig
from ca2cl.evaluation.embed.job import EmbedJob, embed_parts, open_job
from ca2cl.evaluation.embed.parts import KEPT, REMEDY, PartFacts, mine
from ca2cl.evaluation.embed.seen_tiles import find_seen, seen_lines
from ca2cl.evaluation.embed.writer import PatchTokens, outputs, read_about, slides_path, write_vectors
from ca2cl.evaluation.leaks.wording import notes
from ca2cl.registry.resolve import ResolvedEncoder
from ca2cl.runtime.distributed import Ranks

logger = logging.getLogger(__name__)


def run(config: EmbedConfig, encoder: ResolvedEncoder | None = None) -> int:
    """Embed ``config.source`` into ``config.out``; returns the exit code.

    Args:
        config: of the job.
        encoder: what ``config.encoder`` names, for a verb that has found it and says itself what comes next.

    Raises:
        InputError: an unknown encoder, no tiles, an ``out`` that exists or cannot be written, too many bad tiles.
    """
    ranks = Ranks()
    job = ranks.together(lambda: open_job(config, encoder))
    _check_alike(ranks, job)
    with ExitStack() as held:
        if ranks.from_first(lambda: _is_complete(job, held)):
            if ranks.rank == 0:
                sys.stdout.write(f"{config.out}: already complete\n")
                sys.stdout.flush()
            return 0
        try:
            if job.slides is not None:
                job = job.scanned(ranks)
            job = replace(job, seen=ranks.from_first(lambda: _find_seen(job, encoder)))
            finished = ranks.from_first(job.parts.finished)
            tiles, seconds = _embed(job, ranks, finished)
            if ranks.rank == 0:
                rows = _join(job, tiles, seconds)
                sys.stdout.write(_closing(job, rows) if encoder is None else "")
                sys.stdout.flush()
        except BaseException:
            if ranks.world == 1:
                job.parts.remove_if_empty()
            raise
    return 0


def _find_seen(job: EmbedJob, given: ResolvedEncoder | None) -> dict[str, Any]:
    """Tiles that the encoder was trained on; not of a distillation's teacher, which may have seen them."""
    if given is not None:
        return {}
    part = find_seen(job.data, job.found)
    for line in (*seen_lines(part, len(job.data)), *notes({"pretraining": {"the encoder": part}})):
        logger.warning("%s", line)
    return part


def _check_alike(ranks: Ranks, job: EmbedJob) -> None:
    for rank, identity in enumerate(ranks.share(dict(job.parts.identity))):
        other = [name for name, value in identity.items() if value != job.parts.identity.get(name)]
        if other:
            raise InputError(
                f"rank {rank}: has another {', '.join(other)} than rank {ranks.rank}; give all processes the same"
            )


def _is_complete(job: EmbedJob, held: ExitStack) -> bool:
    """True if all is done; otherwise ``out`` is claimed for this job."""
    out, parts = job.out, job.parts
    existing = [path for path in outputs(out) if path.exists()]
    if existing and not job.config.overwrite:
        about = read_about(out)
        if not about or about.get("job") != parts.digest or len(existing) < len(outputs(out)):
            changes = changed(about["identity"], parts.identity) if about and "identity" in about else []
            of = f" of another job ({listed(changes)})" if changes else ""
            raise InputError(f"{existing[0]}: exists{of}; give another name for out, or replace it with --overwrite")
        parts.remove()  # where it was killed while it put them away
        if job.config.preview is not None:
            logger.warning(
                "%s: not drawn, for all vectors are there; give --preview from the start", job.config.preview
            )
        return True
    held.enter_context(parts.job.locked(0.0))
    for path in outputs(out):
        remove_temporaries(path.parent, REMEDY, path.name)
    parts.claim(job.config.overwrite)
    return False


def _embed(job: EmbedJob, ranks: Ranks, finished: dict[int, PartFacts]) -> tuple[int, float]:
    """Make this rank's share of what is missing; the tiles of all ranks, and the seconds of the slowest."""
    todo = mine([part.number for part in job.parts if part.number not in finished], ranks.rank, ranks.world)
    try:
        mine_done = embed_parts(job, todo, finished, ranks)
    except InputError as error:
        # The others may be busy for hours: this process reports it, and the launcher ends them.
        raise (error if ranks.rank == 0 else LocalError(str(error))) from None
    tiles, seconds = zip(*ranks.share(mine_done), strict=True)
    return sum(tiles), max(seconds)


def _join(job: EmbedJob, tiles: int, seconds: float) -> int:
    """Write all parts as one file; the number of its rows."""
    facts = [job.parts.facts(part) for part in job.parts]
    whole = [fact for fact in facts if fact is not None]
    if len(whole) < len(facts):
        raise InputError(
            f"{job.parts.path(facts.index(None))}: not where rank 0 looks for it; give an out on a file system that "
            f"all processes share, and run again: {KEPT}"
        )
    kept = list(zip(job.parts, whole, strict=True))
    if job.slides is not None:
        kept = job.slides.close(job.parts, whole, slides_path(job.out))
    rows = sum(fact.rows for _, fact in kept)
    bad = [tile for fact in whole for tile in fact.bad]
    job.check_bad(len(bad), bad)
    if not rows:
        raise InputError(f"{job.config.source}: none of {len(job.data)} tiles could be decoded; look at them")
    turned = sum(fact.turned for fact in whole)
    if turned:
        logger.warning("%d tiles say that they are to be shown turned (EXIF orientation); taken as stored", turned)
    dim, grid = job.parts.dim, job.parts.grid
    tokens = PatchTokens(grid, [job.parts.tokens_path(part.number) for part, _ in kept]) if grid else None
    tables = partial(map, job.parts.read, [part for part, _ in kept])
    write_vectors(job.out, tables, rows, dim, job.about(bad), tokens, placed=job.parts.placed)
    job.parts.remove()
    rate = f"{tiles / max(seconds, 1e-9):.0f} tiles/s" if tiles else "all parts were finished"
    patches = f" and {grid.height} x {grid.width} tokens of {grid.dim}" if grid else ""
    left_out = f", {len(bad)} tiles that do not decode left out" if bad else ""
    sys.stdout.write(f"{job.out}: {rows} vectors of {dim} numbers{patches}{left_out}, {rate}\n")
    sys.stdout.write("".join(f"{line}\n" for line in seen_lines(job.seen, len(job.data))))
    return rows


def _closing(job: EmbedJob, rows: int) -> str:
    parquet, name = job.out.suffix == ".parquet", repr(str(job.out))
    load = f"import pyarrow.parquet; table = pyarrow.parquet.read_table({name})"
    load = load if parquet else f"from safetensors.numpy import load_file; vectors = load_file({name})"
    return closing(f"{rows} vectors of {job.parts.dim} numbers", job.out, f"in Python: {load}")
