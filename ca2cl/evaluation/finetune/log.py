"""Log a finished fine-tuning job to MLflow, and register its classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ca2cl.config import flatten
from ca2cl.evaluation.finetune.config import FinetuneConfig
from ca2cl.evaluation.report import metric_name, metric_names, tracked_metrics
from ca2cl.evaluation.result import Row
from ca2cl.evaluation.statistics import Difference
from ca2cl.registry.resolve import ResolvedEncoder

LOGGED = "logged.json"
"""Which run the job's results were logged as."""
Compared = Mapping[tuple[str, float], Difference]


def log_once(
    config: FinetuneConfig, found: ResolvedEncoder, rows: Sequence[Row], compared: Compared, files: Sequence[Path],
    digests: Sequence[str], drawn_by: str, tags: Mapping[str, str],
) -> tuple[str, bool]:  # fmt: skip
    """Log the run unless these results were logged there before; its id, and whether they were.

    Args:
        tags: more tags.

    Raises:
        InputError: the store cannot be reached.
    """
    from ca2cl.registry.evaluation_run import log_evaluation_once

    return log_evaluation_once(
        Path(config.output_dir) / LOGGED,
        source_run_id=found.source_run_id,
        name=config.tracking.run_name or "finetune",
        params={**flatten(config), "encoder_uri": found.uri, "drawn_by": drawn_by},
        metrics=_metrics(rows, compared),
        artifacts=files,
        tags={
            **tags,
            "ca2cl.kind": "finetune",
            "ca2cl.protocol": config.note_protocol or config.protocol,
            "ca2cl.train_manifest_digest": digests[0],
            "ca2cl.test_manifest_digest": digests[1],
        },
        uri=config.tracking.uri,
        root=config.tracking.root,
        experiment=config.tracking.experiment,
    )


def _metrics(rows: Sequence[Row], compared: Compared) -> dict[str, float]:
    names = metric_names(list(dict.fromkeys(row.features for row in rows if row.features != rows[0].features)))
    flat = tracked_metrics(rows, names)
    for (start, budget), difference in compared.items():
        flat[f"difference/{metric_name(names[start], rows[0].classifier, budget)}"] = difference.mean
    return flat


def register(config: FinetuneConfig, run_id: str, classifier: Path) -> str | None:
    """Register the classifier under the name that was asked for; its address, None where none was.

    Raises:
        InputError: the store cannot be reached, or refuses the name.
    """
    name = config.tracking.register_as
    if not name:
        return None
    from ca2cl.registry.register import log_and_register
    from ca2cl.store.open import open_store, store_errors

    store = open_store(config.tracking.uri, config.tracking.root)
    with store_errors(store.uri):
        return f"models:/{name}/{log_and_register(run_id, classifier, name, store)}"
