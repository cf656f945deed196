"""What a verb prints of its results: tables, verdicts, warnings, files."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ca2cl.evaluation.compare import Comparison
from ca2cl.evaluation.result import Row
from ca2cl.evaluation.statistics import Units
from ca2cl.evaluation.verdict.compact import WIDTH, compact
from ca2cl.evaluation.verdict.facts import Column, Gap, facts_of
from ca2cl.evaluation.verdict.sentence import Verdict, verdict

DETAILS = "-details.txt"
"""End of the name of the file with the long tables."""
_DRAWS = 5
"""Of labels; Student's t of fewer is very wide."""


@dataclass(frozen=True)
class Summary:
    """Results in short; test sets by name, in order."""

    rows: Mapping[str, Sequence[Row]]
    units: Mapping[str, Units]
    """What the tiles of each test set were resampled by."""
    verdicts: Mapping[str, Verdict]
    notes: Sequence[str]
    """Remarks on the numbers, one line each."""

    def tables(self, *, bold: bool = False) -> str:
        """The compact table of every test set.

        Args:
            bold: mark the best values by bold type, otherwise by a star.
        """
        return "\n".join(compact(rows, self.units[test], test, bold=bold) for test, rows in self.rows.items())

    @property
    def sentences(self) -> list[str]:
        """The verdict on every test set, which is named where there are several."""
        several = len(self.verdicts) > 1
        return [f"{test}: {found.sentence}" if several else found.sentence for test, found in self.verdicts.items()]

    def text(self, *, bold: bool = False) -> str:
        """Tables, verdicts and notes, for the terminal; ``bold`` as in ``tables``."""
        verdicts = "".join(textwrap.fill(line, WIDTH) + "\n" for line in self.sentences)
        notes = "".join(f"\n{textwrap.fill(line, WIDTH, break_on_hyphens=False)}\n" for line in self.notes)
        return f"{self.tables(bold=bold)}\n{verdicts}{notes}"


def summarize(
    rows: Sequence[Row], units: Mapping[str, Units], compared: Sequence[Comparison], leaks: Mapping[str, Sequence[str]],
    *, statement: str = "", remarks: Sequence[str] = (),
) -> Summary:  # fmt: skip
    """Results in short.

    Args:
        rows: of all test sets; their test is ignored where there is one test set.
        units: of every test set, by name.
        compared: all differences.
        leaks: what each test set shares with training data, in words.
        statement: of a protocol that is for comparison with published tables alone.
        remarks: on the test sets.
    """
    of_tests = {test: [row for row in rows if len(units) == 1 or row.test == test] for test in units}
    verdicts = {
        test: verdict(facts_of(of_test, compared, leak=bool(leaks[test]), comparable=not statement))
        for test, of_test in of_tests.items()
    }
    warnings = dict.fromkeys(one.warning for one in units.values())
    draws = dict.fromkeys(_few_draws(of_tests[test], found.gaps) for test, found in verdicts.items())
    notes = [line for line in (statement, *remarks, *warnings, *draws) if line]
    return Summary(of_tests, units, verdicts, notes)


def _few_draws(rows: Sequence[Row], gaps: Sequence[Gap]) -> str:
    """Note that a few draws of labels, which differ, leave a difference open; empty otherwise."""
    draws = len(rows[0].per_seed)
    unequal = {Column(r.classifier, r.budget) for r in rows if len({one.accuracy for one in r.per_seed}) > 1}
    left_open = any(gap.says not in ("ahead", "behind") and gap.column in unequal for gap in gaps)
    return (
        f"{draws} draws of labels: intervals are very wide; use --seeds {_DRAWS}"
        if left_open and draws < _DRAWS
        else ""
    )


def files_text(files: Sequence[Path]) -> str:
    """Where everything was written: the JSON first, then the long tables and what else lies beside it."""
    details, *others = (path.name.removeprefix(files[0].stem) for path in files[1:])
    beside = ", ".join([f"beside it: {details} (the long tables; --details prints them)", *others])
    return f"all numbers: {files[0]}\n{textwrap.fill(beside, WIDTH, break_on_hyphens=False)}\n"


def in_bold() -> bool:
    """True if standard output is a terminal whose user did not turn colours off."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
