"""Downstream results: tables with baselines, and confusion matrices.

Legend: K classes.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ca2cl.common.records import parse_json
from ca2cl.common.tables import short, when
from ca2cl.evaluation.centers import tables as robustness
from ca2cl.evaluation.leaks.wording import lines
from ca2cl.evaluation.report import cells, heads, row_from_dict, score_places
from ca2cl.evaluation.result import ENCODER, Row
from ca2cl.evaluation.splits import describe_budget
from ca2cl.evaluation.tables.calibrations import (
    CALIBRATION_NOTE,
    calibrated_rows,
    calibration_cells,
    calibration_heads,
)
from ca2cl.evaluation.tables.recalls import recall_cells, recall_heads
from ca2cl.evaluation.verdict.compact import best_rows
from ca2cl.evaluation.verdict.facts import chance_level
from ca2cl.registry.downstream import Downstream, newest_by_terms
from ca2cl.report.material import RunMaterial
from ca2cl.report.reliability import Diagram, diagrams
from ca2cl.store.run_artifacts import json_artifacts

logger = logging.getLogger(__name__)
_LEAK = "LEAK:"
_LOUD = ("MADE-UP TISSUE:", _LEAK, "protocol original:")


@dataclass(frozen=True)
class Confusion:
    """A confusion matrix, counts summed over seeds."""

    title: str
    classes: list[str]
    counts: list[list[int]]
    """Row = label, column = prediction."""


@dataclass(frozen=True)
class Table:
    """A small table under the scores."""

    title: str
    heads: Sequence[str]
    rows: list[list[str]]
    own: list[bool]
    """True for the encoder's own rows."""
    notes: list[str] = field(default_factory=list)
    """To print under it."""


@dataclass(frozen=True)
class Result:
    """One downstream run."""

    title: str
    run_id: str
    heads: Sequence[str]
    rows: list[list[str]]
    own: list[bool]
    """True for the encoder's own rows; the others are floors or other starts."""
    notes: list[str] = field(default_factory=list)
    """Data of the numbers, and the notes that the run itself printed under its table."""
    warnings: list[str] = field(default_factory=list)
    """Warnings about the numbers: made-up tissue, a leak, a protocol that looks at the test tiles."""
    kind: str = ""
    """Verb that made the run."""
    verdicts: list[str] = field(default_factory=list)
    """What the numbers show, a sentence for every test set; none of earlier versions."""
    best: list[set[int]] = field(default_factory=list)
    """For every row the cells that are the best of their column, among rows of the same classifier and labels."""
    diagrams: list[Diagram] = field(default_factory=list)
    """Reliability with the most labels."""
    tables: list[Table] = field(default_factory=list)
    """Calibration, recall by class with the most labels, and robustness."""
    confusions: list[Confusion] = field(default_factory=list)


def results(material: RunMaterial) -> list[Result]:
    """The newest downstream run of every kind and pair of data sets; empty where there is none.

    Raises:
        InputError: the store cannot be reached.
    """
    if material.store is None:
        return []
    found = []
    for run in newest_by_terms(material.downstream()).values():
        contents = [c for c in json_artifacts(material.store, run.run_id) if isinstance(c.get("results"), list)]
        found.append(_scored(run, contents[0]) if contents else _metrics(run))
    return found


def _title(run: Downstream) -> str:
    return f"{run.terms.kind}, {when(run.ended)} UTC"


def _data_note(run: Downstream) -> str:
    names = {side: _plain(run.params.get(side, "")) for side in ("train", "test")}
    digests = {"train": run.terms.train, "test": run.terms.test}
    sides = [f"{side} {name} (manifest {short(digests[side])})".replace("  ", " ") for side, name in names.items()]
    return f"{'; '.join(sides)}."


def _plain(param: str) -> str:
    """A parameter that MLflow has as a JSON list, without its brackets."""
    try:
        return ", ".join(map(str, parse_json(param))) if param.startswith("[") else param
    except ValueError:  # a folder's name may begin so too
        return param


def _metrics(run: Downstream) -> Result:
    """A run without our JSON, such as detection: its metrics as they are."""
    rows = [[name, run.shown(name)] for name in sorted(run.scores())]
    return Result(_title(run), run.run_id, ("metric", "value"), rows, [True] * len(rows), [_data_note(run)])


def _scored(run: Downstream, content: Mapping[str, Any]) -> Result:
    try:
        tests = content.get("tests") or {"": content}
        rows = [
            row_from_dict(held, test if len(tests) > 1 else "")
            for test, of_test in tests.items()
            for held in of_test["results"]
        ]
        classes = _classes(content, rows)
        own_notes, warnings = _remarks(content, tests)
        robust = _robustness(content, rows)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        logger.warning(
            "run %s: its JSON is not as this version writes it (%r); only metrics are shown", run.run_id, error
        )
        return _metrics(run)
    names = {ENCODER, *(f"{ENCODER} ({way})" for way in content.get("tokens") or ())}
    own = [row.features in names for row in rows]
    largest = max((row.budget for row, mine in zip(rows, own, strict=True) if mine), key=_size, default=None)
    shown = [row for row, mine in zip(rows, own, strict=True) if mine and row.budget == largest]
    confusions = [_confusion(row, classes) for row in shown]
    several = len(tests) > 1
    shown_cells = [cells(row, several) for row in rows]
    notes = [_data_note(run), *_chances(rows), *_resampled(content, tests, own_notes), *own_notes]
    tables = [*_calibration(rows, names, several), *_recalls(shown, classes), *robust]
    return Result(
        _title(run), run.run_id, heads(several), shown_cells, own, notes, warnings, run.terms.kind,
        _verdicts(run, tests), _best(rows, several), diagrams(shown), tables, confusions,
    )  # fmt: skip


def _verdicts(run: Downstream, tests: Mapping[str, Any]) -> list[str]:
    """The sentences that the run itself printed; no claim where a leak was found since."""
    found = {test: of_test.get("verdict") for test, of_test in tests.items()}
    several = len(tests) > 1
    return [
        f"{f'{test}: ' if several else ''}{held['sentence']}"
        for test, held in found.items()
        if held and (run.terms.rank or held["outcome"] == "none")
    ]


def _best(rows: Sequence[Row], several: bool) -> list[set[int]]:
    of_scores = {place: best_rows(rows, score) for score, place in score_places(several).items()}
    return [{place for place, best in of_scores.items() if id(row) in best} for row in rows]


def _chances(rows: Sequence[Row]) -> list[str]:
    """Accuracy at chance on every test set."""
    firsts = {row.test: row for row in reversed(rows)}
    return [
        f"Top-1 accuracy at chance{f' on {test}' if test else ''}, always naming the most frequent class: "
        f"{chance_level(row):.3f}."
        for test, row in reversed(firsts.items())
    ]


def _calibration(rows: Sequence[Row], own: Container[str], several: bool) -> list[Table]:
    calibrated = calibrated_rows(rows, own)
    shown = [calibration_cells(row, several) for row in calibrated]
    title = f"Calibration: {CALIBRATION_NOTE}"
    return (
        [Table(title, calibration_heads(several), shown, [row.features in own for row in calibrated])] if shown else []
    )


def _recalls(shown: Sequence[Row], classes: Sequence[str]) -> list[Table]:
    """Of the encoder's rows with the most labels, a table for every test set and kind of features."""
    found = []
    for key in dict.fromkeys((row.features, row.test) for row in shown if row.recalls):
        rows = [row for row in shown if (row.features, row.test) == key]
        title = f"Recall by class with 95 %: {key[0]}, {describe_budget(rows[0].budget)} labels"
        cells_of = recall_cells(rows, classes)
        heading = f"{title}, on {key[1]}" if key[1] else title
        found.append(Table(heading, recall_heads(rows), cells_of, [False] * len(cells_of)))
    return found


def _robustness(content: Mapping[str, Any], rows: Sequence[Row]) -> list[Table]:
    first = {row.features for row in rows[:1]}
    found = robustness.tables(content.get("robustness") or {})
    return [Table(one.title, one.heads, one.rows, [row[0] in first for row in one.rows], one.notes) for one in found]


def _size(budget: float) -> tuple[bool, float]:
    # all labels stand above any number of tiles a class
    return (budget == 1, budget)


def _classes(content: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    count = len(rows[0].per_seed[0].confusion) if rows else 0
    named = [str(name) for name in content.get("classes", [])]
    return named if len(named) == count else [f"class {number}" for number in range(count)]


def _remarks(content: Mapping[str, Any], tests: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Notes and warnings; a note that the run wrote itself is kept in its words and not repeated."""
    own_notes = [str(note) for note in content.get("notes") or []]
    statement = str((content.get("protocol") or {}).get("statement", ""))
    loud = [note for note in own_notes if note.startswith(_LOUD)]
    if not any(note.startswith(_LEAK) for note in loud):
        loud += _leaks(tests)
    if statement and statement not in loud:
        loud.append(statement)
    return [note for note in own_notes if note not in loud], loud


def _resampled(content: Mapping[str, Any], tests: Mapping[str, Any], own_notes: Sequence[str]) -> list[str]:
    """Notes on what was resampled for the intervals, one for test sets that share it."""
    statements = {test: (of_test.get("resampled") or content.get("resampled")) for test, of_test in tests.items()}
    if not all(statements.values()):
        return ["95 %: tiles were resampled, by an earlier version, whatever slides they are of."]
    texts = {test: str(held["statement"]) for test, held in statements.items() if held}
    if len(set(texts.values())) == 1:
        texts = {"": next(iter(texts.values()))}
    return [f"{test}: {text}." if test else f"{text}." for test, text in texts.items() if text not in own_notes]


def _leaks(tests: Mapping[str, Any]) -> list[str]:
    """A line for everything that a test set shares with the training set or with the encoder's own data."""
    several = len(tests) > 1
    return [
        f"{line}."
        for test, of_test in tests.items()
        for line in lines(of_test.get("leak") or {}, test if several else "")
    ]


def _confusion(row: Row, classes: list[str]) -> Confusion:
    title = f"{row.features}, {row.classifier}, {describe_budget(row.budget)} labels, {row.labelled} labelled tiles"
    title += f", on {row.test}" if row.test else ""
    seeds = len(row.per_seed)  # every test tile is counted once a seed: 200 tiles are 1000 over 5
    title += f", counts summed over {seeds} seeds" if seeds > 1 else ""
    return Confusion(title, classes, row.confusion.tolist())
