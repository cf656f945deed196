"""Training curves as inline SVG that follows the page's theme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ca2cl.common.records import is_number
from ca2cl.methods.base import Method
from ca2cl.tracking.figures import PANELS, WATCH_PANELS, columns_of, thin
from ca2cl.tracking.running_means import smoothed

WIDTH, HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 10, 8, 24
_POINTS = 400  # as many as a panel has pixels
_COUNTS = {
    "bad_samples": "undecodable tiles replaced",
    "skipped_steps": "steps skipped",
}
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """One line of a panel."""

    label: str
    path: str
    """SVG path; broken where a value was not finite."""
    mean: str
    """Path of the running mean; empty where there is none."""
    dots: list[tuple[float, float]]
    """Points of a line that has too few of them to be one."""
    last: str
    """Its last finite value, or that of the running mean."""


@dataclass(frozen=True)
class Panel:
    """A small chart over optimizer steps."""

    title: str
    unit: str
    curves: list[Curve]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    chance: tuple[float, str] | None = None
    """Place and value of chance."""

    @property
    def description(self) -> str:
        """Text of the chart for screen readers."""
        ends = ("running mean ends at" if curve.mean else "ends at" for curve in self.curves)
        lasts = ", ".join(
            f"{curve.label or self.title} {end} {curve.last}" for curve, end in zip(self.curves, ends, strict=True)
        )
        lasts += f"; chance is {self.chance[1]}" if self.chance else ""
        return f"{self.title}{f' in {self.unit}' if self.unit else ''} over optimizer steps: {lasts}"


def panels(
    lines: Sequence[dict[str, Any]], method: type[Method], watched: Sequence[dict[str, Any]] = (),
    chance: Mapping[str, float] | None = None,
) -> list[Panel]:  # fmt: skip
    """Every panel of the method and of ``tracking.figures`` that training and watch lines have a finite number for.

    Args:
        lines: training lines.
        method: the run's.
        watched: watch lines.
        chance: values of the method's terms at chance.
    """
    trained, looks, drawn = columns_of(lines), columns_of(watched), []
    wanted = [*((trained, one) for one in method.curves), *((looks, one) for one in WATCH_PANELS)]
    for columns, (title, unit, named) in [*wanted, *((trained, one) for one in PANELS)]:
        held = [(columns[name], label) for name, label in named if name in columns]
        held = [(values, label) for values, label in held if np.isfinite(values).any()]
        if held:
            levels = [(chance or {}).get(name) for name, _ in named]
            of_method = (title, unit, named) in method.curves
            drawn.append(_panel(title, unit, columns["step"], held, of_method, levels[0] if of_method else None))
    return drawn


def _panel(
    title: str, unit: str, steps: Numbers, held: Sequence[tuple[Numbers, str]], smooth: bool, chance: float | None
) -> Panel:  # fmt: skip
    # means of nothing are not drawn: an infinite loss would flatten every other point
    clean = [np.where(np.isfinite(values), values, np.nan) for values, _ in held]
    means = [smoothed(values) if smooth else values for values in clean]
    thinned = [thin(values, _POINTS) for values in clean]
    steps = thin(steps, _POINTS)
    x_ticks, x = _axis(steps, _LEFT, WIDTH - _RIGHT, whole=True)
    levels = [] if chance is None else [np.array([chance])]
    y_ticks, y = _axis(np.concatenate([*thinned, *levels]), HEIGHT - _BOTTOM, _TOP)
    curves = [
        _curve(label, x(steps), y(values), y(thin(mean, _POINTS)) if smooth else None, mean)
        for (_, label), values, mean in zip(held, thinned, means, strict=True)
    ]
    level = None if chance is None else (round(float(y(chance)), 1), f"{chance:.3g}")
    return Panel(title, unit, curves, x_ticks, y_ticks, level)


def _axis(values: Numbers, start: float, end: float, whole: bool = False) -> tuple[list[tuple[float, str]], Any]:
    """Ticks with their places, and the function from values to places."""
    from matplotlib.ticker import MaxNLocator

    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if low == high:
        low, high = (low - 0.5, high + 0.5) if low == 0 or whole else (low - abs(low) / 10, high + abs(high) / 10)
    if not whole:  # so that the extremes do not lie on the frame
        low, high = low - (high - low) / 25, high + (high - low) / 25

    def place(found: Any) -> Any:
        return start + (found - low) / (high - low) * (end - start)

    ticks = [tick for tick in MaxNLocator(4, integer=whole).tick_values(low, high) if low <= tick <= high]
    return [(round(float(place(tick)), 1), f"{tick:.6g}") for tick in ticks], place


def _curve(label: str, x_P: Numbers, y_P: Numbers, mean_P: Numbers | None, values: Numbers) -> Curve:
    places = np.flatnonzero(np.isfinite(y_P))
    dots = [(round(float(x_P[p]), 1), round(float(y_P[p]), 1)) for p in places] if len(places) < 30 else []
    mean = "" if mean_P is None else _path(x_P, mean_P)
    return Curve(label, _path(x_P, y_P), mean, dots, f"{values[np.isfinite(values)][-1]:.4g}")


def _path(x_P: Numbers, y_P: Numbers) -> str:
    parts, pen = [], "M"
    for x, y in zip(x_P.tolist(), y_P.tolist(), strict=True):
        if np.isfinite(y):
            parts.append(f"{pen}{x:.1f} {y:.1f}")
        pen = "L" if np.isfinite(y) else "M"
    return "".join(parts)


def counts(lines: Sequence[Mapping[str, Any]], method: type[Method]) -> list[str]:
    """Faults during training: the journal's running totals, as its last line has them."""
    last = lines[-1] if lines else {}
    named = {**_COUNTS, **method.counters}
    return [
        f"{last[name]:.0f} {meaning}" for name, meaning in named.items() if last.get(name) and is_number(last[name])
    ]
