"""``ca2cl export``: an encoder as a file that another program loads, tried by that program's own means first."""

from __future__ import annotations

import difflib
import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ca2cl.config import TrackingConfig
from ca2cl.errors import InputError
from ca2cl.export.output import check_free, check_out, staged
from ca2cl.export.target import Target
from ca2cl.export.to_detectron2 import DETECTRON2
from ca2cl.export.to_onnx import ONNX
from ca2cl.export.to_safetensors import SAFETENSORS
from ca2cl.export.to_timm import TIMM
from ca2cl.export.to_torchvision import TORCHVISION
from ca2cl.export.verify import Trial

if TYPE_CHECKING:
    from ca2cl.registry.resolve import ResolvedEncoder

POSITIONAL = ("out",)
TARGETS = {target.name: target for target in (TORCHVISION, TIMM, DETECTRON2, ONNX, SAFETENSORS)}


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write an encoder as a file that another program loads.

    The file is read back by that program's own means, where it is installed, and takes its place only when its features
    are the encoder's (to 1e-5 of the largest; ONNX to 1e-4). Three lines that load it are printed at the end.
    """

    encoder: str
    """Run id or its first digits, version number, alias (champion, latest), models:/NAME/VERSION, run folder,
    .safetensors file, torchvision:IMAGENET1K_V1 or random."""
    to: str
    """torchvision: state dict without fc (.pth). timm: for create_model(checkpoint_path=...) (.safetensors or .pth).
    detectron2: a backbone for DetectionCheckpointer (.pth, and a .yaml of the settings that belong to it). onnx: RGB in
    [0, 1] to features with the normalisation inside, for any number of tiles of the encoder's size (.onnx).
    safetensors: a folder with encoder.safetensors and card.json, which every verb takes as its encoder. All but the
    last two leave the normalisation to you: its mean and std are printed."""
    out: str
    """The file to write, with the suffix of its kind; for safetensors the folder."""
    overwrite: bool = False
    """Replace what is there."""
    arch: str | None = None
    """Architecture of weights that come without a card: resnet18, resnet34 or resnet50. None takes resnet18."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the encoder is found."""

    def __post_init__(self) -> None:
        if self.to not in TARGETS:
            close = difflib.get_close_matches(self.to.lower(), TARGETS, n=1, cutoff=0.5)
            remedy = f"did you mean {close[0]}?" if close else f"there are {', '.join(TARGETS)}"
            raise InputError(f"to is {self.to!r}: {remedy}")


def run(config: ExportConfig) -> int:
    """Write the file, say what it is and how to load it. Returns the exit code.

    Raises:
        InputError: an unknown encoder, an OUT that cannot be written, a package that is missing, or a file whose
            features are not the encoder's. Nothing is written then.
    """
    from ca2cl.registry.resolve import resolve_encoder

    target, out = TARGETS[config.to], Path(config.out).expanduser().resolve()
    check_out(out, target.suffixes, target.name, config.overwrite)
    found = resolve_encoder(
        config.encoder, tracking_uri=config.tracking.uri, root=config.tracking.root, arch=config.arch
    )
    sys.stdout.write(export(found, target, out, config.overwrite))
    return 0


def export(found: ResolvedEncoder, target: Target, out: Path, overwrite: bool = False) -> str:
    """Build the file, try it, put it in place; returns what is to be said of it.

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
    """What a user, or whoever gets the file, must know; the last three lines are Python that loads it."""
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
    return "\n".join(lines) + f"\n\n{target.snippet(out, card)}"
