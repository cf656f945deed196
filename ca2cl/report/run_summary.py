"""Header, lineage and configuration of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from ca2cl.common.tables import when
from ca2cl.registry.resolve import ResolvedEncoder
from ca2cl.report.material import RunMaterial

Facts = list[tuple[str, str]]
_ENVIRONMENT = ("ca2cl", "torch", "cuda", "cudnn", "gpus", "cpus", "python", "platform", "command")
_STATUS = {
    "RUNNING": "This run has not ended: it is still running, or its machine died. What follows is what there is.",
    "FAILED": "This run failed. What follows is what there was until then.",
    "KILLED": "This run was stopped by a signal after a checkpoint; the command that started it goes on with it.",
}


def status_note(material: RunMaterial) -> str:
    """Note on a status other than FINISHED; empty for that one."""
    return _STATUS.get(material.status, "")


def header(material: RunMaterial, found: ResolvedEncoder | None) -> Facts:
    """Run and encoder in a few lines."""
    entry, last = material.entry, material.lines[-1] if material.lines else {}
    return _known(
        {
            "run id": material.run_id,
            "encoder": found.uri if found else None,
            "aliases": ", ".join(entry.aliases) if entry else None,
            "architecture": f"{found.card.arch}, {found.card.feature_dim} features, {found.card.input_size} px"
            if found
            else None,
            "started": f"{when(material.started)} UTC" if material.started else None,
            "ended": f"{when(material.ended)} UTC" if material.ended else None,
            "trained": f"{_whole(last['step'])} steps, {_whole(last.get('samples'))} tiles" if "step" in last else None,
        }
    )


def lineage(material: RunMaterial, found: ResolvedEncoder | None) -> Facts:
    """Origin of the encoder: data, code, machine, and the run or file that it started from."""
    manifest, environment = material.document("manifest.json"), material.document("environment.json")
    card = found.card if found else None
    commit = environment.get("commit") or (card.commit if card else None)
    named: dict[str, Any] = {
        "data": trained_digest(material) or (card.manifest_digest if card else None),
        "sharded from": manifest.get("source"),
        "tiles": _tiles(manifest),
        "classes": _counts(manifest.get("counts")),
        "view recipe": material.params.get("views.recipe"),
        "start": material.params.get("model.weights"),
        "imported from": card.origin if card else None,
        "trained by run": card.origin_run_id if card else None,
        "configuration digest": card.config_digest if card else None,
        "commit": commit or material.tags.get("mlflow.source.git.commit") or "not known (no git checkout)",
        **{name: _word(environment.get(name)) for name in _ENVIRONMENT},
    }
    return _known(named)


def trained_digest(material: RunMaterial) -> str | None:
    """Digest of the shards that the run was trained on, as far as known."""
    digest = material.document("manifest.json").get("digest") or material.tags.get("ca2cl.manifest_digest")
    return str(digest) if digest else None


def drift(material: RunMaterial) -> Facts:
    """Settings that were changed when the run was resumed."""
    prefix = "param_drift."
    return [
        (name.removeprefix(prefix), value) for name, value in sorted(material.tags.items()) if name.startswith(prefix)
    ]


def configuration(material: RunMaterial) -> Facts:
    """Every setting, by name."""
    return sorted((str(name), str(value)) for name, value in material.params.items())


def nested(material: RunMaterial) -> dict[str, Any]:
    """``config.yaml`` by group; empty where it is missing or damaged."""
    try:
        held = yaml.safe_load(material.files.get("config.yaml", ""))
    except yaml.YAMLError:
        return {}
    return held if isinstance(held, dict) else {}


def _known(named: Mapping[str, Any]) -> Facts:
    return [(name, str(value)) for name, value in named.items() if value not in (None, "")]


def _whole(count: float | None) -> str:
    """A count of a training line: MLflow, which some lines come from, has floats alone."""
    return "?" if count is None else f"{count:.0f}"


def _tiles(manifest: Mapping[str, Any]) -> str | None:
    side = manifest.get("tile_size")
    if not isinstance(side, list) or "samples" not in manifest:
        return None
    return f"{manifest['samples']} of {' x '.join(map(str, side))} px in {manifest.get('shards', '?')} shard(s)"


def _counts(counts: Any) -> str | None:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) if isinstance(counts, dict) else None


def _word(value: Any) -> str | None:
    if isinstance(value, list):
        return " ".join(map(str, value)) or None
    return None if value is None else str(value)
