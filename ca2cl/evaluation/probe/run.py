"""``ca2cl probe``: score frozen features beside baselines."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ca2cl.common.console.summary import closing
from ca2cl.common.files import check_writable
from ca2cl.data.shards.index import ShardIndex
from ca2cl.evaluation.compare import compare_with_first
from ca2cl.evaluation.datasets import (
    ProbeSet,
    check_every_class,
    name_sets,
    open_sets,
    read_set,
    slides_of,
    units_of,
)
from ca2cl.evaluation.leaks.find import find_leak
from ca2cl.evaluation.probe.config import ProbeConfig
from ca2cl.evaluation.probe.encoders import Contenders, find_contenders
from ca2cl.evaluation.probe.record import ProbeRecord
from ca2cl.evaluation.probe.robustness import Probed, assign_centers, measure
from ca2cl.evaluation.probe.scoring import KNN, LINEAR, SGD, Heads, Scoring, score
from ca2cl.evaluation.probe.sgd import RECIPE
from ca2cl.evaluation.protocol import PROTOCOLS, describe_draw
from ca2cl.evaluation.result import ENCODER
from ca2cl.evaluation.splits import draw_subsets
from ca2cl.evaluation.verdict.screen import files_text, in_bold
from ca2cl.runtime.device import find_device
from ca2cl.store.locate import store_flag
from ca2cl.store.open import store_place

_ROWS = {"logistic": LINEAR, "sgd": SGD, "knn": KNN}


def run(config: ProbeConfig) -> int:
    """Probe an encoder: print the table, write the JSON, log the MLflow run. Returns the exit code.

    Raises:
        InputError: data sets that do not fit together, an unknown encoder, an unwritable output.
    """
    indexes = open_sets(config.train, config.tests, config.cache_dir)
    centers = assign_centers(config, indexes)
    device = find_device(config.device)
    contenders = find_contenders(config)
    output = _prepare_output(config, contenders, indexes)
    weights = contenders.encoder.digest()  # before they are on the device
    train, *tests = _read(config, contenders, indexes, device)
    record = _probe(config, contenders, weights, train, dict(zip(name_sets(config.tests), tests, strict=True)))
    probed = Probed(train, record.tests, record.rows, record.heads, record.units)
    record = replace(record, robustness=measure(config, probed, centers, contenders, device))
    if config.details:
        sys.stdout.write(f"{record.details()}\n")
    sys.stdout.write(record.text(bold=in_bold()))
    files = record.write(output)
    sys.stdout.write(f"\n{files_text(files)}")
    sys.stdout.flush()
    # Last, so that a store that is away costs no result.
    place = store_place(config.tracking.uri, config.tracking.root)
    sys.stdout.write(f"logged as MLflow run {record.log(files)} in {place}\n")
    sys.stdout.write(closing("a probe", output.parent, *_next(config, record)))
    return 0


def _next(config: ProbeConfig, record: ProbeRecord) -> list[list[str]]:
    """Commands to go on with: the page of the encoder's run, and training all of it."""
    sets = ["--train", config.train, "--test", config.tests[0]]
    report = ["ca2cl", "report", config.encoder, "report.html", "--test", config.tests[0]]
    tune = ["ca2cl", "finetune", "--encoder", config.encoder, *sets, "--output_dir", "runs/tuned"]
    store = [] if Path(config.encoder).exists() else store_flag(config.tracking.uri, config.tracking.root)
    return [[*words, *store] for words in ([report] if record.contenders.encoder.source_run_id else []) + [tune]]


def _prepare_output(config: ProbeConfig, contenders: Contenders, indexes: Sequence[ShardIndex]) -> Path:
    """The JSON's path.

    The default name is one that another encoder, other data or another protocol does not overwrite.
    """
    if config.output:
        path = Path(config.output)
    else:
        found = contenders.encoder
        name = re.sub(r"[^\w.@-]+", "-", found.source_run_id or found.uri).strip("-")[-64:]
        data = hashlib.sha256("".join(index.manifest.digest for index in indexes).encode()).hexdigest()[:8]
        tokens = "".join(f"-{way}" for way in config.tokens)
        protocol = "" if config.protocol == "honest" else f"-{config.protocol}"
        path = Path(config.tracking.root) / f"probe-{name}-{data}{tokens}{protocol}.json"
    check_writable(path, "output")
    return path


def _read(
    config: ProbeConfig, contenders: Contenders, indexes: Sequence[ShardIndex], device: torch.device
) -> list[ProbeSet]:
    """All sets with their features, train's first; every tile is decoded once."""
    extractors = contenders.extractors(config, device)
    return [
        read_set(
            root,
            index,
            extractors,
            device,
            cache_dir=config.cache_dir,
            batch_size=config.batch_size,
            workers=config.workers,
        )  # fmt: skip
        for root, index in zip((config.train, *config.tests), indexes, strict=True)
    ]


def _probe(
    config: ProbeConfig, contenders: Contenders, weights: str, train: ProbeSet, tests: dict[str, ProbeSet]
) -> ProbeRecord:
    check_every_class(train.root, train.tiles.labels_N, train.index.classes)
    leaks = {
        name: find_leak(
            train.side(),
            test.side(),
            name=name if len(tests) > 1 else "",
            encoders={ENCODER: contenders.encoder, **contenders.rivals},
        )
        for name, test in tests.items()
    }
    protocol = PROTOCOLS[config.protocol]
    slides = slides_of(train.index, train.tiles.samples_N.tolist(), train.root)
    by_slide = slides is not None and config.draw_by == "auto" and not protocol.replacement
    subsets = draw_subsets(
        train.tiles.labels_N, config.labels, config.seeds, groups=slides if by_slide else None, protocol=protocol
    )
    strength = config.strength or ("auto" if slides is not None and protocol.holds_out else 1.0)
    how = Scoring(
        k=config.knn,
        strength=strength,
        classifiers=[row for name, row in _ROWS.items() if name in config.classifiers],
        groups=slides,
        protocol=protocol,
        calibrate=config.calibrate,
        units={name: units_of(test.index, test.tiles.samples_N.tolist(), test.root) for name, test in tests.items()},
        recipe=replace(RECIPE, epochs=config.sgd_epochs, optim=replace(RECIPE.optim, lr=config.sgd_lr)),
    )
    heads: Heads = {}
    rows = score(train.tiles, {name: test.tiles for name, test in tests.items()}, subsets, how, heads)
    return ProbeRecord(
        config=config,
        contenders=contenders,
        train=train,
        tests=tests,
        drawn_by=describe_draw(protocol, by_slide),
        strength=strength,
        subsets=subsets,
        leaks=leaks,
        rows=rows,
        units=how.units,
        compared=compare_with_first(rows),
        weights=weights,
        heads=heads,
        by_slides=slides is not None,
    )
