"""Table of a study: text, JSON, CSV, chart and MLflow run."""

from __future__ import annotations

import csv
import io
import logging
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ca2cl import __version__
from ca2cl.common.console.summary import closing
from ca2cl.common.files import write_atomic
from ca2cl.common.job_dir import REMEDY
from ca2cl.common.tables import aligned
from ca2cl.config import flatten
from ca2cl.errors import InputError
from ca2cl.evaluation.leaks.wording import lines, tag
from ca2cl.evaluation.report import metric_name, plus_minus, write_json
from ca2cl.evaluation.result import ENCODER
from ca2cl.evaluation.splits import describe_budget
from ca2cl.registry.study_run import log_study
from ca2cl.store.locate import store_flag
from ca2cl.store.notes import code_block
from ca2cl.store.open import store_place
from ca2cl.study.chart import draw_chart
from ca2cl.study.comparison import SCORES, Difference, Row, best_floor, by_primary, compare, read_rows
from ca2cl.study.compute import COMPUTE_HEADS, Compute, compute_rows, describe_clock, read_compute
from ca2cl.study.config import StudyConfig
from ca2cl.study.jobs import Job, probe_results
from ca2cl.study.plan import Plan
from ca2cl.tracking.run_record import read_run

logger = logging.getLogger(__name__)
RESULTS, CSV, TEXT, CHART, RUN = "study-results.json", "study.csv", "study.txt", "study.png", "mlflow-run.json"
_HEADS = ("recipe", "classifier", "labels", "tiles", "top-1 accuracy", "balanced acc.", "macro F1", "macro AUROC")
_LEVEL = 0.05


def report(plan: Plan, config: StudyConfig) -> None:
    """Print, write and log the table of all finished jobs.

    Raises:
        InputError: no job is finished, or a file cannot be written.
    """
    done = [job for job in plan.jobs if job.done()]
    if not done:
        raise InputError(f"{plan.out}: no job is finished yet, so there is no table; see --list")
    rows, compute = read_rows(done), [read_compute(job) for job in done]
    first = next(name for name in plan.steps if any(job.recipe == name for job in done))
    differences = compare(rows, first)
    leaks = _leaks(done)
    text = _text(plan, rows, compute, differences) + "".join(f"{line}\n" for line in _leak_lines(leaks))
    sys.stdout.write(text)
    files = [plan.out / name for name in (RESULTS, CSV, TEXT, CHART)]
    write_json(files[0], {**_content(plan, rows, compute, differences), "leaks": _leak_lines(leaks)})
    write_atomic(files[1], write_csv(rows).encode(), REMEDY)
    write_atomic(files[2], text.encode(), REMEDY)
    write_atomic(files[3], draw_chart(rows, plan.study.name), REMEDY)
    sys.stdout.write(f"written to {', '.join(map(str, files))}\n")
    sys.stdout.flush()
    _log(plan, config, _metrics(rows, differences), leaks, text)  # last, so that a store that is away costs no result


def _leaks(done: Sequence[Job]) -> list[tuple[str, dict[str, Any]]]:
    """Test set and overlap with training data of every probe, as ``evaluation.leaks`` found it."""
    contents = [content for job in done if (content := probe_results(job.probe)) is not None]
    return [(test, held["leak"]) for content in contents for test, held in content["tests"].items()]


def _leak_lines(leaks: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Warnings to print under the table, each once."""
    several = len({test for test, _ in leaks}) > 1
    return list(dict.fromkeys(line for test, leak in leaks for line in lines(leak, test if several else "")))


def _text(plan: Plan, rows: Sequence[Row], compute: Sequence[Compute], differences: Sequence[Difference]) -> str:
    several = len({row.test for row in rows}) > 1
    heads = [*_HEADS[:4], *(["test"] if several else []), *_HEADS[4:]]
    shown, draws = by_primary(rows, differences), plan.study.probe.seeds
    parts = [
        aligned(heads, [_cells(row, several) for row in rows]),
        f"mean ± sd between training seeds; a seed's value is the mean over {_count(draws, 'draw')} of labels\n",
        aligned(COMPUTE_HEADS, compute_rows(compute, plan.study.minutes)),
        describe_clock(compute) + "\n",
    ]
    if shown:
        title = f"{shown[0].first} less the others: 95 % by Welch's t between seeds, p corrected by Holm for all "
        parts.append(f"{title}{len(shown)}\n" + "".join(f"{_line(one, several)}\n" for one in shown))
    parts.append(sentence(plan, len(compute), rows, shown) + "\n")
    return "\n".join(parts)


def _cells(row: Row, several: bool) -> list[str]:
    name = f"{row.name} ({row.tokens})" if row.tokens else row.name
    where = [row.test] if several else []
    numbers = [plus_minus(*row.mean_sd(score)) for score in SCORES]
    return [name, row.classifier, describe_budget(row.budget), str(row.labelled), *where, *numbers]


def _where(one: Difference, several: bool) -> str:
    words = [f"{describe_budget(one.budget)} labels"]
    words += [one.tokens] if one.tokens else []
    return ", ".join([*words, *([one.test] if several else [])])


def _line(one: Difference, several: bool) -> str:
    what = f"{one.first} less {one.against}, {one.classifier}, {_where(one, several)}: {one.mean:+.3f}"
    if not math.isfinite(one.interval[0]):
        return f"{what}, without an interval: one seed"
    return f"{what} {_signed(one.interval)}; p = {one.p_holm:.2g}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _signed(interval: tuple[float, float]) -> str:
    return f"[{interval[0]:+.3f}, {interval[1]:+.3f}]"


def sentence(plan: Plan, finished: int, rows: Sequence[Row], shown: Sequence[Difference]) -> str:
    """What the table shows, and what it cannot show.

    Args:
        plan: the study's.
        finished: number of finished jobs.
        rows: the table.
        shown: the differences that are printed.
    """
    seeds, total = min(len(row.seeds) for row in rows if not row.floor), len(plan.jobs)
    minutes, steps = plan.study.minutes, plan.study.steps
    length = f"{minutes:g} minutes each" if minutes is not None else f"{steps} steps each"
    runs = f"{_count(seeds, 'seed')} a recipe" if finished == total else f"{finished} of {total} runs are finished"
    begin = f"{runs}, {length}"
    several = len({row.test for row in rows}) > 1
    found = [f"{begin}: {_verdict(shown, seeds, several)}."]
    halves = [(one.interval[1] - one.interval[0]) / 2 for one in shown if math.isfinite(one.interval[0])]
    if halves:
        found.append(
            f"The intervals are ± {statistics.median(halves):.3f} wide (median): this study cannot see differences "
            "much smaller than that."
        )
    return " ".join([*found, *_beside_floors(rows, several)])


def _verdict(shown: Sequence[Difference], seeds: int, several: bool) -> str:
    if not shown:
        return "there is one recipe, and nothing to compare it with"
    first, how = shown[0].first, f"{shown[0].classifier} probe, Holm over {_count(len(shown), 'comparison')}"
    if seeds < 2:
        return "one seed says nothing about the spread between seeds, so no recipes are compared"
    real = [one for one in shown if one.p_holm < _LEVEL]
    if not real:
        smallest = min(one.p_holm for one in shown)
        return f"no recipe differs from {first} by more than seeds do ({how}, smallest p = {smallest:.2g})"
    words = [
        f"{first} is {'above' if one.mean > 0 else 'below'} {one.against} at {_where(one, several)} by "
        f"{abs(one.mean):.3f} (p = {one.p_holm:.2g})"
        for one in real
    ]
    rest = "" if len(real) == len(shown) else "; the other differences are no larger than those between seeds"
    return f"{', '.join(words)}{rest} ({how})"


def _beside_floors(rows: Sequence[Row], several: bool) -> list[str]:
    """A sentence for every place where no recipe is above the floors."""
    found = []
    for row in rows:
        if row.floor or row.classifier != rows[0].classifier or row.name != rows[0].name:
            continue
        beside = [one.mean_sd("accuracy")[0] for one in rows if not one.floor and one.place == row.place]
        for floor, accuracy in best_floor(rows, row.place).items():
            if accuracy >= max(beside):
                on = f" on {row.test}" if several else ""
                where = f"At {describe_budget(row.budget)} labels{on}"
                found.append(f"{where} no recipe is above the {floor} ({accuracy:.3f}).")
    return found


def _content(
    plan: Plan, rows: Sequence[Row], compute: Sequence[Compute], differences: Sequence[Difference]
) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "kind": "study",
        "ca2cl": __version__,
        "study": plan.study.name,
        "planned": {"minutes": plan.study.minutes, "steps": plan.steps, "seeds": plan.study.seeds},
        "runs": {"finished": len(compute), "of": len(plan.jobs)},
        "results": [row.as_dict() for row in rows],
        "differences": [vars(one) for one in differences],
        "differences_by": "Welch's t between training seeds, taken as independent; Holm within each classifier",
        "compute": [one.as_dict() for one in compute],
        "minutes_are": describe_clock(compute),
        "summary": sentence(plan, len(compute), rows, by_primary(rows, differences)),
    }


def write_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV, with one line for every seed."""
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow(("recipe", "floor", "tokens", "classifier", "budget", "labelled", "test", "seed", *SCORES))
    for row in rows:
        for seed, *values in zip(row.seeds, *(row.scores[score] for score in SCORES), strict=True):
            where = (row.name, int(row.floor), row.tokens, row.classifier, row.budget, row.labelled, row.test)
            writer.writerow((*where, "" if row.floor else seed, *values))
    return written.getvalue()


def _log(
    plan: Plan, config: StudyConfig, metrics: Mapping[str, float], leaks: Sequence[tuple[str, dict[str, Any]]],
    text: str,
) -> None:  # fmt: skip
    tracking, files = config.tracking, [plan.out / name for name in (RESULTS, CSV, TEXT, CHART, "study.json")]
    children = [read_run(job.folder).run_id for job in plan.jobs if job.done()]
    try:
        run_id = log_study(
            plan.out / RUN,
            [child for child in children if child],
            name=tracking.run_name or plan.study.name,
            params={"minutes": plan.study.minutes, "seeds": plan.study.seeds, **_recipe_params(plan)},
            metrics=metrics,
            tags={name: value for _, leak in leaks for name, value in tag(leak, ENCODER).items()},
            description=f"Study {plan.study.name}\n\n{code_block(text)}",
            artifacts=files,
            finished=len(children) == len(plan.jobs),
            uri=tracking.uri,
            root=tracking.root,
            experiment=tracking.experiment,
        )
    except InputError as error:
        logger.warning("not logged in MLflow: %s; `ca2cl study ... --table` logs it later", error)
        return
    sys.stdout.write(f"logged as MLflow run {run_id} in {store_place(tracking.uri, tracking.root)}\n")
    sys.stdout.write(
        closing("a study's table and chart", plan.out, ["ca2cl", "ui", *store_flag(tracking.uri, tracking.root)])
    )


def _recipe_params(plan: Plan) -> dict[str, Any]:
    """Steps of every recipe, and the settings in which recipes differ."""
    flat = {name: flatten(recipe) for name, recipe in plan.study.recipes.items()}
    keys = [key for key in next(iter(flat.values())) if len({str(one[key]) for one in flat.values()}) > 1]
    params: dict[str, Any] = {f"{name}.steps": steps for name, steps in plan.steps.items()}
    return params | {f"{name}.{key}": one[key] for name, one in flat.items() for key in keys}


def _metrics(rows: Sequence[Row], differences: Sequence[Difference]) -> dict[str, float]:
    """By name; those of the first test set and the encoders' own pooling."""
    flat: dict[str, float] = {}
    for row in (one for one in rows if (one.test, one.tokens) == (rows[0].test, rows[0].tokens)):
        name = metric_name(row.name, row.classifier, row.budget)
        for score in SCORES:
            flat[f"{name}/{score}"], flat[f"{name}/{score}_sd_of_seeds"] = row.mean_sd(score)
    for one in differences:
        if (one.test, one.tokens) == (rows[0].test, rows[0].tokens):
            flat[f"difference/{metric_name(one.against, one.classifier, one.budget)}"] = one.mean
    return {name: value for name, value in flat.items() if math.isfinite(value)}
