"""``ca2cl export``: write an encoder for another library, verified by it."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ca2cl.common.console.summary import closing
from ca2cl.export.config import ExportConfig
from ca2cl.export.output import check_free, check_out, staged
from ca2cl.export.target import Target
from ca2cl.export.targets import TARGETS
from ca2cl.export.verify import Trial
from ca2cl.registry.resolve import ResolvedEncoder, resolve_encoder


def run(config: ExportConfig) -> int:
    """Write the file, say what it is and how to load it. Returns the exit code.

    Raises:
        InputError: an unknown encoder, an OUT that cannot be written, a package that is missing, or a file whose
            features are not the encoder's. Nothing is written then.
    """
    target, out = TARGETS[config.to], Path(config.out).expanduser().resolve()
    check_out(out, target.suffixes, target.name, config.overwrite)
    found = resolve_encoder(
        config.encoder, tracking_uri=config.tracking.uri, root=config.tracking.root, arch=config.arch
    )
    sys.stdout.write(export(found, target, out, config.overwrite))
    return 0


def export(found: ResolvedEncoder, target: Target, out: Path, overwrite: bool = False) -> str:
    """Build the file, try it, put it in place; returns a text about it.

    Args:
        found: the encoder.
        target: the format.
        out: the file.
        overwrite: whether one that is there is replaced.

    Raises:
        InputError: see ``run``.
    """
    # Where a card does not say it, the registry knows which run it was.
    found = replace(found, card=replace(found.card, source_run_id=found.source_run_id))
    trial = Trial(found)
    files = target.build(found.encoder, found.card, out)
    for name in files:
        if "/" not in name and name != out.name:
            check_free(out.parent / name, True, overwrite)
    with staged(files, out) as path:
        verdict = trial.of(target, path)
    return _report(found, target, out, files, verdict)


def _report(found: ResolvedEncoder, target: Target, out: Path, files: Mapping[str, bytes], verdict: str) -> str:
    """Text about the file for its users; the last three lines are Python that loads it."""
    card = found.card
    lines = [
        f"target    {target.name}",
        f"encoder   {card.arch} from {found.uri}, step {card.step}",
        f"run       {found.source_run_id or 'none known'}",
        f"features  {card.feature_dim}",
        f"input     {card.input_size} x {card.input_size} px, RGB in [0, 1]",
        f"mean      {' '.join(f'{value}' for value in card.mean)}",
        f"std       {' '.join(f'{value}' for value in card.std)}",
        f"verified  {verdict}",
    ]
    for name, content in files.items():
        size, digest = len(content), hashlib.sha256(content).hexdigest()
        lines.append(f"file      {out.parent / name}, {size:,} bytes, sha256 {digest}")
        if name.endswith(".yaml"):
            lines += ["", *content.decode().splitlines(), ""]
    end = closing(f"an encoder for {target.name}", out, "in Python:")
    return "\n".join(lines) + f"\n{end}\n{target.snippet(out, card)}"
