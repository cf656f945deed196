"""Output of a probe: text, JSON, confusion matrix, MLflow run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ca2cl import __version__
from ca2cl.common.files import write_atomic, writing
from ca2cl.config import flatten
from ca2cl.evaluation import report as shared
from ca2cl.evaluation.centers.plot import draw_shifts
from ca2cl.evaluation.centers.tables import tables
from ca2cl.evaluation.centers.tracked import tracked
from ca2cl.evaluation.compare import Comparison, differences
from ca2cl.evaluation.datasets import ProbeSet, describe_missing, missing_classes
from ca2cl.evaluation.leaks.wording import lines
from ca2cl.evaluation.linear_head import SUFFIX, HeadCard, write_head
from ca2cl.evaluation.probe.classifiers import Strength
from ca2cl.evaluation.probe.config import ProbeConfig
from ca2cl.evaluation.probe.encoders import Contenders
from ca2cl.evaluation.probe.scoring import Heads
from ca2cl.evaluation.protocol import PROTOCOLS
from ca2cl.evaluation.result import ENCODER, Row
from ca2cl.evaluation.splits import Subsets
from ca2cl.evaluation.statistics import Units
from ca2cl.evaluation.tables.calibrations import calibration_table, draw_calibration
from ca2cl.evaluation.tables.recalls import recall_table
from ca2cl.evaluation.verdict.screen import DETAILS, Summary, summarize
from ca2cl.registry.evaluation_run import TOKENS_TAG
from ca2cl.registry.resolve import ResolvedEncoder
from ca2cl.store.notes import short_name

SCHEMA_VERSION = 2
_REMEDY = "free some space, or give a file in a folder you can write"


@dataclass(frozen=True)
class ProbeRecord:
    """A finished probe. Test sets are named; the first is the one that promotes an encoder."""

    config: ProbeConfig
    contenders: Contenders
    train: ProbeSet
    tests: dict[str, ProbeSet]
    drawn_by: str
    """Unit that labelled tiles were drawn by."""
    strength: Strength
    """C of the logistic regression, or auto."""
    subsets: Subsets
    leaks: dict[str, dict[str, Any]]
    rows: list[Row]
    units: Mapping[str, Units]
    """Units that the tiles of each test set were resampled by."""
    compared: list[Comparison]
    weights: str
    """Digest of the encoder's."""
    heads: Heads
    """Linear classifiers that were fitted."""
    by_slides: bool
    """Whole slides or patients were held out, for they are known."""
    robustness: Mapping[str, Any] = field(default_factory=dict)
    """To centres, shifts and other test sets, as the JSON has it (``probe.robustness``)."""

    @property
    def statement(self) -> str:
        """Note to print wherever the numbers are shown; empty for the honest protocol."""
        return PROTOCOLS[self.config.protocol].statement

    @property
    def remarks(self) -> list[str]:
        """Notes on the test sets to print beside the numbers, one line each."""
        several = len(self.tests) > 1
        found = []
        for name in self.tests:
            shown = name if several else ""
            found += [*lines(self.leaks[name], shown), describe_missing(self._missing(name), shown)]
        return [line for line in found if line]

    def _missing(self, test: str) -> list[str]:
        return missing_classes(self.tests[test].tiles.labels_N, self.train.index.classes)

    @cached_property
    def summary(self) -> Summary:
        """The results in short."""
        leaks = {name: lines(leak) for name, leak in self.leaks.items()}
        return summarize(
            self.rows, self.units, self.compared, leaks, statement=self.statement, remarks=self.remarks
        )  # fmt: skip

    def text(self, *, bold: bool = False) -> str:
        """For the terminal: the results in short, and robustness where it was measured; ``bold`` as in ``Summary``."""
        return self.summary.text(bold=bold) + "".join(table.text() for table in tables(self.robustness))

    def details(self) -> str:
        """The long tables: every metric, differences, recalls, calibration."""
        compared = differences(self.rows[0].features, self.compared, name_tests=len(self.tests) > 1)
        several = len(self.tests) > 1
        resampled = "".join(
            f"{f'{name}: ' if several else ''}{units.statement}\n" for name, units in self.units.items()
        )
        own = list(dict.fromkeys(row.features for row in self.rows if row.features.split(" (")[0] == ENCODER))
        more = recall_table(self.rows, self.train.index.classes)
        more += calibration_table(self.rows, own, self.by_slides)
        draws = shared.describe_draws(self.config.seeds)
        how = f"\n{draws}; labelled tiles drawn by {self.drawn_by}; strength {self.strength}\n{resampled}"
        return f"{shared.table(self.rows)}{compared}{more}{how}"

    def content(self) -> dict[str, Any]:
        """Everything that the JSON holds.

        ``tests`` has every test set; ``results`` and so on are those of the first. Labelled tiles are sample numbers
        in index order; all of them, once each, read ``all``.
        """
        per_test = {name: self._of(name) for name in self.tests}
        first = per_test[next(iter(per_test))]
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "probe",
            "ca2cl": __version__,
            "protocol": {"name": self.config.protocol, "statement": self.statement},
            "verdict": first["verdict"],
            "encoder": self._describe(self.contenders.encoder),
            "against": {name: self._describe(found) for name, found in self.contenders.rivals.items()},
            "classes": self.train.index.classes,
            "data": {"train": self.train.describe(), "test": first["data"]},
            "tokens": list(self.config.tokens),
            "config": {**flatten(self.config), "strength": self.strength},
            "drawn_by": self.drawn_by,
            "temperature_by": "slide or patient" if self.by_slides else "tile",
            **{key: first[key] for key in ("leak", "resampled", "results", "differences")},
            "tests": per_test,
            "robustness": self.robustness,
            "labelled_tiles": self._labelled(),
        }

    def _of(self, test: str) -> dict[str, Any]:
        return {
            "data": {**self.tests[test].describe(), "missing_classes": self._missing(test)},
            "verdict": self.summary.verdicts[test].as_dict(),
            "leak": self.leaks[test],
            "resampled": self.units[test].as_dict(),
            "results": [shared.row_as_dict(row) for row in self.rows if row.test == test],
            "differences": [c.as_dict() for c in self.compared if c.test == test],
        }

    def _describe(self, found: ResolvedEncoder) -> dict[str, Any]:
        return {**found.describe(), "image_size": self.config.image_size or found.card.input_size}

    def _labelled(self) -> dict[str, list[Any]]:
        samples_N = self.train.tiles.samples_N
        every_N = np.arange(len(samples_N))
        return {
            f"{budget:g}": ["all" if np.array_equal(rows, every_N) else samples_N[rows].tolist() for rows in draws]
            for budget, draws in self.subsets.items()
        }

    def write(self, output: Path) -> list[Path]:
        """The JSON, the long tables, and a confusion matrix for each test set: the first classifier's at the largest
        budget."""
        shared.write_json(output, self.content())
        files = [output, output.with_name(f"{output.stem}{DETAILS}")]
        write_atomic(files[1], f"{self.text()}\n{self.details()}".encode(), _REMEDY)
        for number, test in enumerate(self.tests):
            ours = [row for row in self.rows if (row.features, row.test) == (self.rows[0].features, test)]
            shown = [row for row in ours if row.classifier == ours[0].classifier][-1]
            on = f" on {test}" if len(self.tests) > 1 else ""
            title = f"{shown.features}, {shown.classifier}, {shown.labelled} labelled tiles{on}: % of each label"
            files.append(output.with_name(f"{output.stem}-confusion{f'-{test}' if number else ''}.png"))
            shared.draw_confusion(files[-1], shown.confusion, self.train.index.classes, title, shown.recalls)
            path = output.with_name(f"{output.stem}-reliability{f'-{test}' if number else ''}.png")
            title = f"{shown.features}, {shown.classifier}, {shown.labelled} labelled tiles{on}: reliability"
            files += [path] if draw_calibration(path, shown, title) else []
        if "shifts" in self.robustness:
            files.append(output.with_name(f"{output.stem}-shifts.png"))
            draw_shifts(files[-1], self.robustness["shifts"])
        return [*files, *self._write_head(output.with_name(f"{output.stem}{SUFFIX}"))]

    def _write_head(self, path: Path) -> list[Path]:
        """Keep the first draw's linear classifier with the most labels, of the encoder's first features.

        Its logits are divided by its temperature, if whole slides chose that. One whose epoch the test tiles chose is
        not kept.
        """
        features = self.rows[0].features
        fitted = [row for row in self.rows if (row.features, row.classifier, row.budget) in self.heads]
        ours = [row for row in fitted if row.features == features and row.classifier == fitted[0].classifier]
        if not ours or self.config.protocol != "honest":
            with writing(path, _REMEDY):
                path.unlink(missing_ok=True)  # of an earlier probe of that name
            return []
        row, found = max(ours, key=lambda row: row.labelled), self.contenders.encoder
        head, setting = self.heads[features, row.classifier, row.budget], row.settings[0]
        if self.by_slides and row.calibration and row.calibration.temperatures:
            temperature = row.calibration.temperatures[0]
            head, setting = head.cooled(temperature), {**setting, "temperature": temperature}
        local = Path(found.uri)
        height, width = self.train.index.manifest.tile_size
        card = HeadCard(
            classes=tuple(self.train.index.classes),
            encoder=str(local.resolve()) if local.exists() else found.uri,
            source_run_id=found.source_run_id,
            weights=self.weights,
            image_size=self.config.image_size or found.card.input_size,
            pooling=self.config.tokens[0] if self.config.tokens else "default",
            classifier=row.classifier,
            labels=row.budget,
            labelled=row.labelled,
            setting=setting,
            tile_size=(height, width),
            train_manifest_digest=self.train.index.manifest.digest,
        )
        write_head(path, head, card, _REMEDY)
        return [path]

    def metrics(self) -> dict[str, float]:
        """By name, for MLflow. Those of the first test set are named as they are where there is but one, those of the
        others behind ``other_tests/NAME/``, where nothing takes them for the encoder's: MLflow allows no @ in a name.
        """
        names = self.contenders.tracked_names(self.config.tokens)
        flat: dict[str, float] = {}
        for number, test in enumerate(self.tests):
            rows = [row for row in self.rows if row.test == test]
            found = shared.tracked_metrics(rows, names, [c for c in self.compared if c.test == test])
            flat |= {f"other_tests/{test}/{name}" if number else name: value for name, value in found.items()}
        return flat | tracked(self.robustness, names)

    def log(self, files: Sequence[Path]) -> str:
        """Log it as a run of its own and return the run's id.

        Raises:
            InputError: the store cannot be used.
        """
        digests = {name: test.index.manifest.digest for name, test in self.tests.items()}
        first, *others = digests
        tags = {"ca2cl.kind": "probe", "ca2cl.resampled_by": self.units[first].name}
        if others:
            tags["ca2cl.other_test_manifest_digests"] = json.dumps({name: digests[name] for name in others})
        if self.config.tokens:
            tags[TOKENS_TAG] = " ".join(self.config.tokens)
        if self.statement:
            tags["ca2cl.protocol"] = self.statement
        run_id, _ = shared.log_results(
            self.config, self.contenders.encoder, self.metrics(), files,
            name=self.config.tracking.run_name or f"probe of {short_name(self.contenders.encoder.uri)}",
            sets=[
                (self.train.root, self.train.index.manifest, "training"),
                *((test.root, test.index.manifest, "testing") for test in self.tests.values()),
            ],
            shown=self.summary.tables(), verdict=" ".join(self.summary.sentences),
            digests=(self.train.index.manifest.digest, digests[first]), leak=self.leaks[first], tags=tags,
            params={"strength": self.strength, "drawn_by": self.drawn_by},
        )  # fmt: skip
        return run_id
