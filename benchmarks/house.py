"""Size and shape of the source, by commands that anyone can run.

    python -m benchmarks.house                                # this checkout
    python -m benchmarks.house --against ../ca2cl-f1aef52     # another one beside it
    python -m benchmarks.house --names                        # with the modules and functions behind the counts

Nothing is imported, so any commit can be read: ``git worktree add ../ca2cl-f1aef52 f1aef52``. Lines are those of the
package's Python files, blank lines, comments and docstrings included; a folder's files are those beside its
``__init__``. A function's length goes from its ``def`` to its
last line. Public functions are functions and methods without a leading underscore, nested ones left out; ``self`` is no
parameter.
"""

from __future__ import annotations

import argparse
import ast
import io
import statistics
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.imports import PACKAGE, Module, circles, closure, import_graph, read_modules, room_graph, verb_modules

MISPLACED = (
    "data/atomic", "data/groups", "data/job_folder", "data/splits", "data/synthetic", "data/synthetic_glands",
    "data/synthetic_paint", "evaluation/device", "evaluation/finetune_data", "evaluation/probe_data",
    "evaluation/probe_report", "evaluation/ranks", "tracking/encoder_files", "tracking/observer", "tracking/resolver",
    "tracking/tables", "training/feed", "views/preprocess",
)  # fmt: skip
"""Modules that more than their own package uses, or that do another package's work, where commit f1aef52 had them."""
VERBS = ("shard", "probe", "pretrain", "finetune", "embed", "export", "detect", "report", "reproduce nct")
FORM = {"base", "config", "report", "run"}
"""File names that every verb's folder may have."""


class Count(NamedTuple):
    """A number, as printed, and what it counts."""

    text: str
    names: Sequence[str] = ()


class Function(NamedTuple):
    name: str
    node: ast.FunctionDef | ast.AsyncFunctionDef
    parameters: int
    nested: bool

    @property
    def lines(self) -> int:
        return (self.node.end_lineno or 0) - self.node.lineno + 1

    @property
    def docstring(self) -> str:
        return ast.get_docstring(self.node) or ""


class Source:
    """What is measured of a checkout."""

    def __init__(self, root: Path) -> None:
        self.modules = read_modules(root)
        if not self.modules:
            raise SystemExit(f"{root}: no folder {PACKAGE} with Python files; give the root of a checkout")
        self.graph = import_graph(self.modules)
        self.verbs = {verb: name for table in verb_modules(self.modules).values() for verb, name in table.items()}
        self.functions = [function for module in self.modules.values() for function in _functions(module)]

    def counts(self, starts: Sequence[str]) -> dict[str, Count]:
        """Every number by its label; ``starts`` are verbs or modules whose imports are followed."""
        found = self._sizes() | self._folders() | self._documentation()
        for start in starts:
            found[f"imports of {start}: files / lines"] = self._closure(start)
        return found | self._rooms()

    def _sizes(self) -> dict[str, Count]:
        files = sorted(module.lines for module in self.modules.values())
        lengths = sorted(function.lines for function in self.functions)
        comments = Counter(kind for module in self.modules.values() for kind in _comments(module.source))
        total = sum(files)
        return {
            "files": Count(f"{len(files)}"),
            "lines": Count(f"{total:,}"),
            "file, median / max lines": Count(f"{statistics.median(files):g} / {files[-1]}"),
            "function, median / p99 / max lines": Count(
                f"{statistics.median(lengths):g} / {lengths[int(0.99 * len(lengths))]} / {lengths[-1]}"
            ),
            "comments, share of lines": Count(f"{100 * sum(comments.values()) / total:.1f} %"),
        }

    def _folders(self) -> dict[str, Count]:
        folders: dict[str, list[str]] = defaultdict(list)
        for module in self.modules.values():
            if not module.is_package:
                folders[module.folder].append(module.path.stem)
        largest = max(folders, key=lambda folder: len(folders[folder]))
        stems = Counter(stem for names in folders.values() for stem in names if stem not in FORM)
        shared = [stem for stem, number in sorted(stems.items()) if number > 1]
        prefixed = [f"{folder}/{name}" for folder in sorted(folders) for name in _prefixed(folders[folder])]
        groups = circles(self.graph)
        rooms = circles(room_graph(self.modules, self.graph))
        here = {module.name for module in self.modules.values() if not module.is_package}
        left = [name for name in MISPLACED if f"{PACKAGE}.{name.replace('/', '.')}" in here]
        return {
            "folders": Count(f"{len(folders)}"),
            "files in the largest folder": Count(f"{len(folders[largest])} ({largest})"),
            "files told apart by a prefix that 3 share": Count(f"{len(prefixed)}", prefixed),
            "file names in several folders": Count(f"{len(shared)}", shared),
            "circles of imports": Count(f"{len(groups)}", [", ".join(sorted(group)) for group in groups]),
            "circles of imports between folders": Count(f"{len(rooms)}", [", ".join(sorted(group)) for group in rooms]),
            "modules in the wrong package": Count(f"{len(left)} of {len(MISPLACED)}", left),
        }

    def _documentation(self) -> dict[str, Count]:
        public = [one for one in self.functions if not one.nested and not one.node.name.startswith("_")]
        many = [one for one in public if one.parameters >= 4]
        brief = [one for one in many if "\n" not in one.docstring]
        unnamed = [one.name for one in many if "Args:" not in one.docstring]
        long = [module.name for module in self.modules.values() if len(_first_line(module).split()) > 12]
        one_line = [one for one in public if one.docstring and "\n" not in one.docstring]
        return {
            "public functions": Count(f"{len(public)}"),
            "  with a docstring of one line": Count(f"{len(one_line)}"),
            "  with 4 parameters or more": Count(f"{len(many)}"),
            "  of these with a docstring of one line or none": Count(f"{len(brief)}", [one.name for one in brief]),
            "  of these without Args:": Count(f"{len(unnamed)}", unnamed),
            "modules whose first line has > 12 words": Count(f"{len(long)}", long),
        }

    def _closure(self, start: str) -> Count:
        module = start if start in self.modules else self.verbs.get(start, "")
        if module not in self.modules:
            return Count("-")
        names = sorted(closure(self.graph, [module]))
        return Count(f"{len(names)} / {sum(self.modules[name].lines for name in names):,}", names)

    def _rooms(self) -> dict[str, Count]:
        lines: Counter[str] = Counter()
        for module in self.modules.values():
            parts = module.folder.split("/")
            for depth in range(len(parts)):
                lines["/".join(parts[: depth + 1])] += module.lines
        return {f"lines of {folder or 'the top level'}": Count(f"{lines[folder]:,}") for folder in sorted(lines)}


def _functions(module: Module) -> Iterator[Function]:
    def walk(node: ast.AST, prefix: str, in_class: bool, nested: bool) -> Iterator[Function]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                static = any(isinstance(one, ast.Name) and one.id == "staticmethod" for one in child.decorator_list)
                arguments = child.args
                number = len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs])
                yield Function(f"{prefix}.{child.name}", child, number - (in_class and not static), nested)
                yield from walk(child, f"{prefix}.{child.name}", in_class=False, nested=True)
            elif isinstance(child, ast.ClassDef):
                yield from walk(child, f"{prefix}.{child.name}", in_class=True, nested=nested)
            else:
                yield from walk(child, prefix, in_class, nested)

    return walk(module.tree, module.name, in_class=False, nested=False)


def _comments(source: str) -> Iterator[str]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield "own line" if token.line.lstrip().startswith("#") else "trailing"


def _prefixed(stems: Sequence[str]) -> list[str]:
    first = Counter(stem.split("_")[0] for stem in stems)
    return sorted(stem for stem in stems if first[stem.split("_")[0]] >= 3)


def _first_line(module: Module) -> str:
    return (ast.get_docstring(module.tree) or "").partition("\n")[0]


def _print_table(columns: Sequence[dict[str, Count]], titles: Sequence[str], *, names: bool) -> None:
    labels = list(dict.fromkeys(label for column in columns for label in column))
    width = max(map(len, labels))
    print(" " * width + "".join(f"  {title:>20}" for title in titles))
    for label in labels:
        cells = [column.get(label, Count("-")) for column in columns]
        print(f"{label:{width}}" + "".join(f"  {cell.text:>20}" for cell in cells))
        if names and not label.startswith("imports of"):
            for name in cells[-1].names:
                print(f"    {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="the checkout to measure")
    parser.add_argument("--against", type=Path, help="another checkout, printed to the left")
    parser.add_argument(
        "--closure", nargs="+", default=VERBS, metavar="WHAT", help="verbs or modules whose imports are followed"
    )
    parser.add_argument("--names", action="store_true", help="print what the counts of --root count")
    options = parser.parse_args()
    roots = [root for root in (options.against, options.root) if root]
    columns = [Source(root).counts(options.closure) for root in roots]
    _print_table(columns, [root.resolve().name for root in roots], names=options.names)


if __name__ == "__main__":
    main()
