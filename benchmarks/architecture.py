"""Draw the package's folders and their imports, and list what each holds, in docs/.

    python -m benchmarks.architecture            # writes docs/architecture.svg, and the table in docs/architecture.md
    python -m benchmarks.architecture --check    # exit code 1 if either is out of date

A folder stands above all that it imports, directly or not. Of the arrows those are left out that others imply: where A
imports B and B imports C, none goes from A to C (transitive reduction). Arrows that pass a floor run together where
they go to the same folder. Where folders import each other in a circle, the thinnest import of it is drawn dashed.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import defaultdict
from collections.abc import Sequence
from html import escape
from pathlib import Path

from benchmarks import imports
from benchmarks.imports import Graph, Module

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- made by benchmarks/architecture.py -->\n", "<!-- end -->\n"
BOX_HEIGHT, FLOOR_HEIGHT, GAP, LANE, MARGIN = 30, 84, 22, 10, 24
COLOURS = ("#dbeafe", "#dcfce7", "#fef3c7", "#fce7f3", "#ede9fe", "#ffedd5", "#ccfbf1", "#fee2e2", "#e0e7ff", "#ecfccb")

Node = tuple[str, int]
"""A folder and a floor: its box where that is the folder's own floor, else the lane of the arrows that go to it."""


class Layout:
    """Floors from the bottom, the order within each, and places.

    Args:
        graph: folders that each folder imports, without circles, reduced.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.floor: dict[str, int] = {}
        for room in sorted(graph):
            self._climb(room)
        for room in sorted(graph, key=lambda room: -self.floor[room]):  # up to its importers: shorter arrows
            above = [self.floor[other] for other in graph if room in graph[other]]
            self.floor[room] = min(above, default=self.floor[room] + 1) - 1
        self.edges = sorted(self._edges())  # means of places would round by the order of a set
        self.rows: list[list[Node]] = [[] for _ in range(max(self.floor.values()) + 1)]
        for node in sorted({node for edge in self.edges for node in edge} | set(self.floor.items())):
            self.rows[node[1]].append(node)
        self._order()
        self.x = self._places()

    def _climb(self, room: str) -> int:
        if room not in self.floor:
            self.floor[room] = max((self._climb(target) + 1 for target in self.graph[room]), default=0)
        return self.floor[room]

    def _edges(self) -> set[tuple[Node, Node]]:
        """From floor to floor."""
        found = set()
        for room, targets in self.graph.items():
            for target in targets:
                path = [(room, self.floor[room])]
                path += [(target, floor) for floor in range(self.floor[room] - 1, self.floor[target] - 1, -1)]
                found |= set(zip(path, path[1:], strict=False))
        return found

    def _near(self, node: Node, step: int) -> list[Node]:
        """Neighbours on the floor above (1) or below (-1)."""
        return [b if a == node else a for a, b in self.edges if node == (b if step == 1 else a)]

    def _order(self, sweeps: int = 24) -> None:
        """Fewer crossings: each floor in the order of its neighbours' mean places, down and up again."""
        for sweep in range(sweeps):
            step = 1 if sweep % 2 == 0 else -1
            rows = self.rows[::-1] if step == 1 else self.rows
            place: dict[Node, float] = {}
            for row in rows:
                for at, node in enumerate(row):
                    near = [place[other] for other in self._near(node, step)]
                    place[node] = sum(near) / len(near) if near else (at + 0.5) / len(row)
                row.sort(key=lambda node: (place[node], node))
                for at, node in enumerate(row):
                    place[node] = (at + 0.5) / len(row)

    def _places(self, rounds: int = 40) -> dict[Node, float]:
        """Centres: each near the mean of its neighbours, as far as the order and the boxes' widths allow."""
        x = {node: sum(map(self.width, row[:at])) + GAP * at for row in self.rows for at, node in enumerate(row)}
        for _ in range(rounds):
            for row in self.rows:
                wanted = {}
                for node in row:
                    near = [x[other] for step in (1, -1) for other in self._near(node, step)]
                    wanted[node] = sum(near) / len(near) if near else x[node]
                self._spread(row, wanted)
                x.update(wanted)
        least = min(x[node] - self.width(node) / 2 for node in x)
        return {node: place - least + MARGIN for node, place in x.items()}

    def _spread(self, row: list[Node], wanted: dict[Node, float]) -> None:
        """Pushes apart what would overlap: half from the left, half from the right."""
        left, right = dict(wanted), dict(wanted)
        for a, b in zip(row, row[1:], strict=False):
            left[b] = max(left[b], left[a] + (self.width(a) + self.width(b)) / 2 + GAP)
        for a, b in zip(row[::-1], row[-2::-1], strict=False):
            right[b] = min(right[b], right[a] - (self.width(a) + self.width(b)) / 2 - GAP)
        wanted.update({node: (left[node] + right[node]) / 2 for node in row})

    def width(self, node: Node) -> float:
        """Of a box or a lane."""
        return 18 + 7.4 * len(node[0]) if self.is_box(node) else LANE

    def is_box(self, node: Node) -> bool:
        return self.floor[node[0]] == node[1]


def draw(graph: Graph, against: Sequence[tuple[str, str]] = ()) -> str:
    """The drawing as SVG.

    Args:
        graph: as ``Layout`` takes it.
        against: imports that go up, which close circles.
    """
    layout = Layout(graph)
    top = len(layout.rows) - 1
    width = max(layout.x[node] + layout.width(node) / 2 for node in layout.x) + MARGIN
    height = 2 * MARGIN + top * FLOOR_HEIGHT + BOX_HEIGHT
    packages = sorted({room.partition("/")[0] for room in graph if "/" in room})
    parts = []
    for a, b in sorted(layout.edges):
        x1, x2 = layout.x[a], layout.x[b]
        y1 = MARGIN + (top - a[1]) * FLOOR_HEIGHT + BOX_HEIGHT
        y2 = MARGIN + (top - b[1]) * FLOOR_HEIGHT - (3 if layout.is_box(b) else 0)
        bend = (y2 - y1) / 2
        head = ' marker-end="url(#head)"' if layout.is_box(b) else ""
        parts.append(
            f'<path d="M{x1:.0f} {y1}C{x1:.0f} {y1 + bend:.0f} {x2:.0f} {y2 - bend:.0f} {x2:.0f} {y2}"{head}/>'
        )
        if not layout.is_box(b):
            parts.append(f'<path d="M{x2:.0f} {y2}v{BOX_HEIGHT}"/>')
    for low, high in against:
        x1, x2 = (layout.x[room, layout.floor[room]] + 9 for room in (low, high))
        y1, y2 = (MARGIN + (top - layout.floor[room]) * FLOOR_HEIGHT for room in (low, high))
        parts.append(f'<path d="M{x1:.0f} {y1}L{x2:.0f} {y2 + BOX_HEIGHT + 3}" class="up" marker-end="url(#head)"/>')
    for node in sorted(layout.x):
        if layout.is_box(node):
            package = node[0].partition("/")[0]
            colour = COLOURS[packages.index(package) % len(COLOURS)] if package in packages else "#f3f4f6"
            x, y, wide = layout.x[node], MARGIN + (top - node[1]) * FLOOR_HEIGHT, layout.width(node)
            parts.append(
                f'<rect x="{x - wide / 2:.0f}" y="{y}" width="{wide:.0f}" height="{BOX_HEIGHT}" rx="5" '
                f'fill="{colour}"/>'
                f'<text x="{x:.0f}" y="{y + 20}">{escape(node[0])}</text>'
            )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
        f'viewBox="0 0 {width:.0f} {height}">\n'
        "<title>Folders of ca2cl; an arrow goes from a folder to one that it imports</title>\n"
        "<style>path{fill:none;stroke:#6b7280;stroke-width:1.3}.up{stroke:#b91c1c;stroke-dasharray:4}rect{stroke:#374151}"
        "text{font:13px Helvetica,Arial,sans-serif;text-anchor:middle;fill:#111827}</style>\n"
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8Z" style="fill:#6b7280;stroke:none"/></marker></defs>\n'
        f'<rect width="{width:.0f}" height="{height}" style="fill:white;stroke:none"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def table(modules: dict[str, Module]) -> str:
    """What each folder holds, as Markdown."""
    files: dict[str, list[str]] = defaultdict(list)
    about: dict[str, str] = {}
    for module in modules.values():
        if module.is_package or not module.folder:
            text = (ast.get_docstring(module.tree) or "").partition("\n")[0].rstrip(".")
            about[module.room] = text.replace("``", "`").replace("|", "\\|")
        else:
            files[module.room].append(module.path.stem)
    rows = [f"| `{room}` | {about[room]} | {' '.join(files[room])} |" for room in sorted(about)]
    return "\n".join(["| folder | holds | files |", "| --- | --- | --- |", *rows]) + "\n"


def main() -> int:
    """Write both files, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a file is out of date")
    check = parser.parse_args().check
    everything = imports.read_modules(DOCS.parent)
    modules = {name: module for name, module in everything.items() if module.folder or module.path.stem[:2] != "__"}
    graph = imports.import_graph(modules)
    for name, verbs in imports.verb_modules(modules).items():  # imported by name, when the command line asks for them
        graph[name] |= set(verbs.values()) - {name}
    page = DOCS / "architecture.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    rooms, against = imports.break_circles(imports.room_graph(modules, graph), imports.room_imports(modules, graph))
    contents = {
        DOCS / "architecture.svg": draw(imports.reduced(rooms), against),
        page: before + BEGIN + "\n" + table(modules) + "\n" + END + after,
    }
    stale = [path for path, text in contents.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if check:
            sys.stderr.write(f"{path.name} is out of date: python -m benchmarks.architecture\n")
        else:
            path.write_text(contents[path], encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
