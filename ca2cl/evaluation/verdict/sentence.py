"""Sentence that says what a comparison of encoders shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ca2cl.evaluation.splits import describe_budget
from ca2cl.evaluation.verdict.facts import Column, Facts, Gap, above_chance
from ca2cl.evaluation.verdict.rivals import COLOUR, IMAGENET, RANDOM, baseline, short

_ADVICE = {
    COLOUR: "train longer, or use stronger colour jitter",
    IMAGENET: "train longer, or start from ImageNet weights",
    RANDOM: "train longer",
}
Outcome = Literal["none", "chance", "alone", "ahead", "mixed", "behind", "level"]


@dataclass(frozen=True)
class Verdict:
    """What a comparison shows."""

    outcome: Outcome
    """none: nothing is claimed. chance: not above chance anywhere. alone: nothing to compare with. ahead, behind:
    significantly, of all others in all columns. level: no difference is significant. mixed: the rest."""
    sentence: str
    chance: float
    gaps: tuple[Gap, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        says = [
            {"against": gap.against, **gap.column._asdict(), "says": gap.says} for gap in self.gaps
        ]  # fmt: skip
        return {**asdict(self), "metric": "accuracy", "gaps": says}


def verdict(facts: Facts) -> Verdict:
    """What the facts show, in plain words.

    "Ahead" and "worse" are said only of differences that are significant after Holm's correction.
    """
    if reason := _nothing_to_claim(facts):
        return Verdict("none", f"No verdict: {reason}.", facts.chance, ())
    columns = [level.column for level in facts.levels]
    low = [level.column for level in facts.levels if not above_chance(level, facts.chance)]
    if len(low) == len(columns):
        where = "Nowhere" if len(columns) > 1 else "Not"
        words = f"{where} significantly above chance ({facts.chance:.3f}): train longer."
        return Verdict("chance", words, facts.chance, facts.gaps)
    if not facts.gaps:
        words = (
            f"Above chance ({facts.chance:.3f}){_where(_without(columns, low), columns)}; compared with nothing else."
        )
        return Verdict("alone", words, facts.chance, ())
    words = _compared(facts.gaps, columns)
    if low:
        words += f" Not above chance ({facts.chance:.3f}){_where(low, columns)}."
    return Verdict(_outcome(facts.gaps), words, facts.chance, facts.gaps)


def _nothing_to_claim(facts: Facts) -> str:
    if facts.leak:
        return "there is a leak, so these numbers say little about new tiles"
    if not facts.comparable:
        return "protocol original is for comparison with the authors' table alone"
    if any(math.isnan(level.interval[0]) for level in facts.levels):
        return "all test tiles are of one slide or patient, so nothing is known about others"
    return ""


def _outcome(gaps: Sequence[Gap]) -> Outcome:
    said = {gap.says for gap in gaps}
    if said == {"ahead"}:
        return "ahead"
    if said == {"behind"}:
        return "behind"
    return "mixed" if said & {"ahead", "behind"} else "level"


def _compared(gaps: Sequence[Gap], columns: Sequence[Column]) -> str:
    """The clauses on all rivals, and what to do."""
    rivals: dict[str, list[Gap]] = {}
    for gap in gaps:
        rivals.setdefault(gap.against, []).append(gap)
    grouped: dict[str, list[str]] = {}
    for rival, of_rival in rivals.items():
        grouped.setdefault(_clause(of_rival, columns), []).append(rival)
    clauses = [clause.format(_named(names, len(rivals))) for clause, names in grouped.items()]
    text, advice = "; ".join(clauses), _advice(gaps)
    text = f"{text[0].upper()}{text[1:]}"
    if not advice:
        return f"{text}."
    return f"{text}. {advice[0].upper()}{advice[1:]}." if len(clauses) > 1 else f"{text}: {advice}."


def _clause(gaps: Sequence[Gap], columns: Sequence[Column]) -> str:
    """How the encoder does against one rival; {} stands for its name."""
    ahead, behind = ([gap.column for gap in gaps if gap.says == word] for word in ("ahead", "behind"))
    if len(ahead) == len(gaps):
        return f"ahead of {{}}{_every(columns)}"
    if len(behind) == len(gaps):
        return f"worse than {{}}{_every(columns)}"
    if ahead and behind:
        return f"ahead of {{}} in {len(ahead)} of {len(gaps)} columns, but worse{_where(behind, columns)}"
    if ahead:
        return f"ahead of {{}} in {len(ahead)} of {len(gaps)} columns, no significant difference in the others"
    if behind:
        return f"worse than {{}}{_where(behind, columns)}, no significant difference in the others"
    for word, side in (("higher", 1), ("lower", -1)):
        if all(gap.difference * side > 0 for gap in gaps) and any(gap.says == word for gap in gaps):
            return f"{word} than {{}}{_every(columns)}, but not significantly"
    return "level with {}: no difference is significant"


def _named(rivals: Sequence[str], total: int) -> str:
    """Rivals in words."""
    if len(rivals) == total and total > 1 and all(map(baseline, rivals)):
        return "both baselines" if total == 2 else f"all {total} baselines"
    words = [baseline(rival) or short(rival) for rival in rivals]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _every(columns: Sequence[Column]) -> str:
    """All columns of the table in words; empty for a single one."""
    classifiers, budgets = ({column[place] for column in columns} for place in (0, 1))
    if len(classifiers) > 1:
        return " with every classifier and label budget" if len(budgets) > 1 else " with every classifier"
    return " at every label budget" if len(budgets) > 1 else ""


def _where(some: Sequence[Column], columns: Sequence[Column]) -> str:
    """Some columns in words: by name if they are one or two, or all of a classifier or of a budget."""
    if len(some) == len(columns):
        return _every(columns)
    several = len({column.classifier for column in columns}) > 1
    if len({column.budget for column in columns}) == 1:
        return f" with {' and '.join(column.classifier for column in some)}"
    for classifier in {column.classifier for column in some} if several else ():
        if list(some) == [column for column in columns if column.classifier == classifier]:
            return f" with {classifier} at every label budget"
    for budget in {column.budget for column in some} if several else ():
        if list(some) == [column for column in columns if column.budget == budget]:
            return f" with {_labels(budget)} by every classifier"
    if len(some) > 2:
        return f" in {len(some)} of {len(columns)} columns"
    named = [
        f"{column.classifier} and {_labels(column.budget)}" if several else _labels(column.budget) for column in some
    ]
    return f" with {', and with '.join(named)}"


def _labels(budget: float) -> str:
    return f"{describe_budget(budget)} of the labels" if budget <= 1 else f"{int(budget)} labels a class"


def _without(columns: Sequence[Column], some: Sequence[Column]) -> list[Column]:
    return [column for column in columns if column not in some]


def _advice(gaps: Sequence[Gap]) -> str:
    """What to do where a baseline is ahead; empty where none is."""
    worse = {baseline(gap.against) for gap in gaps if gap.says == "behind"}
    return next((advice for name, advice in _ADVICE.items() if name in worse), "")
