"""Import graph of the package, read from its source.

Nothing is imported, so any checkout can be read, whatever is installed.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PACKAGE = "ca2cl"
Graph = dict[str, set[str]]


@dataclass(frozen=True)
class Module:
    """One source file of the package."""

    name: str
    """Dotted, such as ``ca2cl.training.loop``; a package's ``__init__`` has the package's name."""
    path: Path

    @cached_property
    def source(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @cached_property
    def lines(self) -> int:
        return len(self.source.splitlines())

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def folder(self) -> str:
        """Below the package's folder, such as ``data/shards``; empty for the package's own files."""
        parts = self.name.split(".")[1:]
        return "/".join(parts if self.is_package else parts[:-1])

    @property
    def room(self) -> str:
        """The folder; the file's own name for a file in none."""
        return self.folder or self.path.stem


def read_modules(root: Path) -> dict[str, Module]:
    """Modules of the checkout at ``root``, by dotted name."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = Module(name, path)
    return found


def import_graph(modules: dict[str, Module]) -> Graph:
    """Modules of the package that each module imports, those under ``TYPE_CHECKING`` and inside functions included."""
    return {name: set(_imported(module, modules)) - {name} for name, module in modules.items()}


def _imported(module: Module, modules: dict[str, Module]) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in whole]
        else:
            continue
        yield from (name for name in names if name in modules)


def verb_modules(modules: dict[str, Module]) -> dict[str, dict[str, str]]:
    """The module of each verb, from the table ``VERBS``, by the module that holds the table."""
    return {name: found for name, module in modules.items() if (found := dict(_verbs(module, modules)))}


def _verbs(module: Module, modules: dict[str, Module]) -> Iterator[tuple[str, str]]:
    for node in module.tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and target.id == "VERBS" and isinstance(value, ast.Dict):
            for key, entry in zip(value.keys, value.values, strict=True):
                words = [one.value for one in ast.walk(entry) if isinstance(one, ast.Constant)]
                named = [word for word in words if isinstance(word, str) and word in modules]
                if isinstance(key, ast.Constant) and named:
                    yield str(key.value), named[0]


def room_imports(modules: dict[str, Module], graph: Graph) -> Counter[tuple[str, str]]:
    """How many imports of modules go from each room to each other one."""
    pairs = ((modules[name].room, modules[target].room) for name in graph for target in graph[name])
    return Counter((here, there) for here, there in pairs if here != there)


def room_graph(modules: dict[str, Module], graph: Graph) -> Graph:
    """Rooms that each room imports."""
    rooms: Graph = {module.room: set() for module in modules.values()}
    for here, there in room_imports(modules, graph):
        rooms[here].add(there)
    return rooms


def closure(graph: Graph, starts: Iterable[str]) -> set[str]:
    """``starts`` and all that they import, directly or not."""
    seen, waiting = set(), list(starts)
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting.extend(graph[name])
    return seen


def circles(graph: Graph) -> list[set[str]]:
    """Groups of nodes that all reach one another, of two or more."""
    reached = {name: closure(graph, [name]) for name in graph}
    groups = {frozenset(other for other in reached[name] if name in reached[other]) for name in graph}
    return sorted((set(group) for group in groups if len(group) > 1), key=sorted)


def break_circles(graph: Graph, weights: Counter[tuple[str, str]]) -> tuple[Graph, list[tuple[str, str]]]:
    """``graph`` without circles, and the edges left out for that: of each circle the ones of least weight."""
    graph, left_out = {name: set(targets) for name, targets in graph.items()}, []
    while groups := circles(graph):
        inside = [(name, target) for name in groups[0] for target in graph[name] & groups[0]]
        name, target = min(inside, key=lambda edge: (weights[edge], edge))
        graph[name].remove(target)
        left_out.append((name, target))
    return graph, left_out


def reduced(graph: Graph) -> Graph:
    """The fewest edges with the same closures (transitive reduction) of a graph without circles."""
    reached = {name: closure(graph, [name]) for name in graph}
    return {
        name: {target for target in targets if not any(target in reached[other] for other in targets - {target})}
        for name, targets in graph.items()
    }
