"""Chart of a study: dots for seeds, bars for means."""

from __future__ import annotations

import io
from collections.abc import Sequence

from ca2cl.evaluation.splits import describe_budget
from ca2cl.study.comparison import Row

_STYLES = (":", "--", "-.")


def draw_chart(rows: Sequence[Row], title: str) -> bytes:
    """A PNG with one panel a label budget: accuracy by the first classifier on the first test set, and the floors."""
    from matplotlib.figure import Figure

    first = rows[0]
    shown = [
        row for row in rows if (row.classifier, row.test, row.tokens) == (first.classifier, first.test, first.tokens)
    ]
    budgets = list(dict.fromkeys(row.budget for row in shown))
    names = list(dict.fromkeys(row.name for row in shown if not row.floor))
    figure = Figure(figsize=(1.6 + len(budgets) * (0.9 + 0.65 * len(names)), 4.2), layout="constrained")
    panels = figure.subplots(1, len(budgets), squeeze=False)[0]
    for axes, budget in zip(panels, budgets, strict=True):
        for place, name in enumerate(names):
            for row in (one for one in shown if (one.name, one.budget, one.floor) == (name, budget, False)):
                values = row.scores["accuracy"]
                axes.plot([place] * len(values), values, "o", color="tab:blue", alpha=0.6)
                axes.plot([place - 0.3, place + 0.3], [row.mean_sd("accuracy")[0]] * 2, color="black")
        floors = [row for row in shown if row.floor and row.budget == budget]
        for style, row in zip(_STYLES, floors, strict=False):
            axes.axhline(row.mean_sd("accuracy")[0], color="grey", linestyle=style, label=row.name)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set(title=f"{describe_budget(budget)} labels", xlim=(-0.6, len(names) - 0.4))
    panels[0].set_ylabel(f"accuracy, {first.classifier}")
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(f"{title}: each dot is a training seed, bars are means")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120)
    return drawn.getvalue()
