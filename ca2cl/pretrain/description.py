"""Description of a run on MLflow's page."""

from __future__ import annotations

from ca2cl.config import flatten
from ca2cl.data.shards.index import Manifest
from ca2cl.pretrain.config import PretrainConfig

_MOST_CLASSES = 12


def describe_run(config: PretrainConfig, manifest: Manifest, steps: int, start: str | None, run_id: str = "") -> str:
    """A run in Markdown.

    Args:
        config: its settings; those that differ from the defaults are listed.
        manifest: of its tiles.
        steps: optimizer steps of the whole run.
        start: where its first weights come from; None: random.
        run_id: where the encoder is registered by now; the text then says how to use it.
    """
    height, width = manifest.tile_size
    classes = ", ".join(f"{name} {count:,}" for name, count in list(manifest.counts.items())[:_MOST_CLASSES])
    defaults, now = flatten(PretrainConfig()), flatten(config)
    left_out = ("data.shards", "run.output_dir", "tracking.")
    changed = [
        f"| `{name}` | {value} |"
        for name, value in now.items()
        if value != defaults.get(name) and not name.startswith(left_out)
    ]
    use = (
        f"**Use it**: `ca2cl probe --encoder {run_id} --train SHARDS --test SHARDS`, "
        f"`ca2cl report {run_id} report.html`, or in Python `ca2cl.load_encoder('{run_id}')`."
    )
    parts = [
        f"**{config.method.name}** pre-training of a {config.model.arch} for {steps:,} steps of "
        f"{config.run.batch_size:,} tiles, from {start or 'random weights'}.",
        f"**Data**: {manifest.samples:,} tiles of {width} x {height} pixels from {manifest.source} "
        f"({classes or 'without labels'}), manifest `{manifest.digest[:12]}`.",
        *([use] if run_id else []),  # before the table: MLflow folds a long description
        "\n".join(["| setting | value |", "| --- | --- |", *changed]),
    ]
    return "\n\n".join(parts)
