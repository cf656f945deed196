"""The house: which folder may import which, how many files one holds, and what they are called."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import ca2cl

PACKAGE = Path(ca2cl.__file__).parent
GROUND = {"errors", "common", "common.console", "config"}
"""What every room but those that it is made of may import."""
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "common": {"errors"},
    "common.console": {"common"},
    "config": {"common"},
    "runtime": {"errors"},
    "api": {
        "runtime", "data", "data.shards", "data.remote", "data.loading", "models", "views", "methods", "methods.ca2cl",
        "registry", "store",
    },
    "cli": {"runtime", "store", "data.synthetic"},
    "store": set(),
    "data": set(),
    "data.sources": set(),
    "data.synthetic": set(),
    "data.shards": {"data", "data.sources", "runtime", "slides"},
    "data.transfer": set(),
    "data.remote": {"data.shards", "data.transfer"},
    "data.fingerprints": {"data.loading", "data.remote", "data.shards"},
    "data.loading": {"data", "data.shards", "data.remote", "runtime"},
    "slides": {"data", "data.sources", "data.transfer", "runtime", "slides.readers", "slides.regions", "slides.tissue"},
    "slides.readers": set(),
    "slides.regions": set(),
    "slides.tissue": set(),
    "models": {"runtime", "models.blocks", "models.gpu"},
    "models.blocks": set(),
    "models.gpu": set(),
    "models.timm": {"models", "models.blocks"},
    "views": {"views.draw", "views.cpu", "views.gpu", "data.shards", "data.remote", "data.loading"},
    "views.draw": set(),
    "views.cpu": {"views.draw"},
    "views.gpu": {"views.draw", "runtime"},
    "methods": {"models", "models.blocks"},
    "methods.ca2cl": {"methods", "models"},
    "methods.distill": {"methods", "models"},
    "training": {"runtime"},
    "weights": {"models", "models.timm"},
    "registry": {"data", "data.fingerprints", "store", "models", "models.timm", "weights"},
    "tracking": {"store", "registry"},
    "encoders": {"store", "registry", "models"},
    "encoders.import_": {"store", "registry", "tracking", "models", "encoders", "data.fingerprints"},
    "pretrain": {
        "runtime", "data.shards", "data.remote", "data.transfer", "data.loading", "data.fingerprints", "models",
        "views", "methods", "training", "registry", "tracking", "weights", "evaluation.embed", "pretrain.memory",
        "pretrain.watch",
    },
    "pretrain.watch": {
        "runtime", "data.shards", "data.remote", "data.transfer", "data.loading", "models", "views", "methods",
        "methods.ca2cl", "training", "evaluation",
    },
    "pretrain.memory": {"runtime", "models", "methods", "training"},
    "doctor": {
        "runtime", "store", "data.shards", "data.remote", "data.loading", "models", "views", "methods", "pretrain",
        "doctor.leaks",
    },
    "doctor.leaks": {"runtime", "data.shards", "data.remote", "data.loading", "data.fingerprints"},
    "doctor.plan": {"models", "methods", "pretrain", "pretrain.memory"},
    "evaluation": {
        "store", "data.shards", "data.remote", "data.loading", "data.fingerprints", "models", "registry",
        "evaluation.leaks", "evaluation.calibration",
    },
    "evaluation.calibration": set(),
    "evaluation.leaks": {"data.shards", "data.remote", "data.fingerprints", "models", "registry"},
    "evaluation.tables": {"evaluation", "evaluation.calibration"},
    "evaluation.verdict": {"evaluation"},
    "evaluation.embed": {
        "runtime", "data", "data.sources", "data.shards", "data.remote", "data.loading", "models", "registry",
        "slides", "slides.readers", "slides.tissue", "data.fingerprints", "evaluation.leaks",
    },
    "evaluation.centers": {"data.shards", "slides", "evaluation"},
    "evaluation.probe": {
        "runtime", "store", "data.shards", "data.remote", "data.loading", "registry", "training", "evaluation",
        "evaluation.calibration", "evaluation.centers", "evaluation.leaks", "evaluation.tables", "evaluation.verdict",
    },
    "evaluation.finetune": {
        "runtime", "store", "data.shards", "data.remote", "data.loading", "models", "views", "training", "registry",
        "tracking", "evaluation", "evaluation.calibration", "evaluation.leaks", "evaluation.tables",
        "evaluation.verdict", "data.fingerprints",
    },
    "detection": {"detection.engines", "detection.scores"},
    "detection.coco": {"data"},
    "detection.network": {"models", "training"},
    "detection.engines": {
        "runtime", "data", "data.sources", "models", "registry", "training", "detection.coco", "detection.network",
    },
    "detection.prepare": {"data", "data.sources", "detection.coco"},
    "detection.predict": {
        "runtime", "store", "data", "data.sources", "registry", "detection.coco", "detection.engines",
        "detection.prepare", "detection.scores", "detection.train",
    },
    "detection.scores": {"data", "detection.coco", "detection.engines"},
    "detection.train": {
        "runtime", "store", "data", "data.shards", "models", "registry", "tracking", "evaluation", "evaluation.leaks",
        "detection.coco", "detection.engines", "detection.prepare", "detection.scores",
    },
    "export": {"models", "models.timm", "registry", "detection.engines"},
    "report": {
        "runtime", "store", "data.shards", "data.remote", "data.loading", "models", "views", "methods", "registry",
        "tracking", "evaluation", "evaluation.calibration", "evaluation.centers", "evaluation.leaks",
        "evaluation.tables", "evaluation.verdict", "report.places",
    },
    "report.places": {"data.shards", "data.remote", "slides"},
    "heatmap": {
        "runtime", "store", "slides", "slides.readers", "slides.regions", "models", "registry", "evaluation",
        "evaluation.embed",
    },
    "study": {
        "cli", "runtime", "store", "data.remote", "pretrain", "registry", "tracking", "evaluation", "evaluation.leaks",
        "evaluation.probe",
    },
    "reproduce": {
        "runtime", "store", "data.sources", "data.synthetic", "data.shards", "data.remote", "data.transfer", "models",
        "registry", "evaluation", "evaluation.embed", "evaluation.leaks", "evaluation.probe", "evaluation.finetune",
        "evaluation.tables",
    },
}  # fmt: skip
ONLY_IN = {
    "mlflow": {"store", "registry", "tracking"},
    "detectron2": {"detection.engines"},
    "fvcore": {"detection.engines"},
    "pycocotools": {"detection.coco"},
    "deepspeed": set[str](),
    "jsonargparse": {"cli"},
    "datasets": {"data.sources"},
    "webdataset": {"data.shards"},
    "numba": {"views.cpu"},
    "triton": {"models.gpu", "views.gpu"},
    "openslide": {"slides.readers"},
    "tifffile": {"slides.readers"},
    "zarr": {"slides.readers"},
    "shapely": {"slides.regions"},
    "skimage": {"slides.tissue"},
    "timm": {"models.blocks", "models.timm", "export", "weights"},
    "huggingface_hub": {"weights", "data.sources"},
    "sklearn": {"evaluation", "evaluation.probe", "report"},
}
"""Libraries that one part of the house stands for."""
MOST_FILES = 13
SAME_STEM = {"run", "config", "base", "report"}
"""Stems that mean the same in every folder that has one; any other stem may stand for two things at most."""
OLD_PATHS = {"detection.engine", "detection.predictions", "detection.scoring", "tracking.serving"}
"""Modules that hand on names from where they lay before: programs and registered models import them."""


def modules() -> dict[str, Path]:
    """Every module of the package by its name without ``ca2cl.``; packages themselves are not among them."""
    found = [path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py")]
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in found}


def room_of(module: str) -> str:
    """The folder of a module; ``config`` and ``errors`` are rooms of their own."""
    return module.rpartition(".")[0] or module


@cache
def imports(path: Path) -> tuple[str, ...]:
    """Full names that a module imports anywhere in it, functions and type checking included."""
    found = list[str]()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [one.name for one in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{one.name}" for one in node.names]
    return tuple(found)


def imported_modules(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The package's own modules among a module's imports."""
    for name in imports(path):
        words = name.split(".")
        if words[0] != "ca2cl":
            continue
        own = next((n for n in range(len(words), 1, -1) if ".".join(words[1:n]) in known), 0)
        if own:
            yield ".".join(words[1:own])


def arrows() -> dict[str, dict[str, list[str]]]:
    """Room → room that it imports → the modules that do."""
    known, found = modules(), defaultdict[str, dict[str, list[str]]](dict)
    for name, path in known.items():
        for other in imported_modules(path, known):
            if room_of(other) != room_of(name):
                found[room_of(name)].setdefault(room_of(other), []).append(f"{name} -> {other}")
    return found


def test_every_room_is_in_the_plan() -> None:
    assert {room_of(name) for name in modules()} == set(MAY_IMPORT)


def test_a_room_imports_only_what_the_plan_allows() -> None:
    wrong = [
        way
        for room, others in arrows().items()
        for other, ways in others.items()
        if other not in MAY_IMPORT[room] and not (other in GROUND and room not in GROUND)
        for way in ways
    ]
    assert not wrong, "\n".join(wrong)


def test_the_plan_has_no_arrow_that_nobody_needs() -> None:
    there = arrows()
    idle = [f"{room} -> {other}" for room, others in MAY_IMPORT.items() for other in others - set(there.get(room, ()))]
    assert not idle, f"leave out of MAY_IMPORT: {', '.join(idle)}"


def test_the_plan_has_no_circle() -> None:
    left = {room: others | (GROUND if room not in GROUND else set()) for room, others in MAY_IMPORT.items()}
    while free := [room for room, others in left.items() if not others & left.keys()]:
        for room in free:
            del left[room]
    assert not left, f"rooms that import one another: {', '.join(left)}"


def test_no_modules_import_one_another() -> None:
    known = modules()
    left = {name: set(imported_modules(path, known)) - {name} for name, path in known.items()}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"modules that import one another: {', '.join(left)}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_imported_in_its_rooms_only(library: str) -> None:
    rooms = {
        room_of(name)
        for name, path in modules().items()
        if any(one.partition(".")[0] == library for one in imports(path))
    }
    assert rooms <= ONLY_IN[library]


@pytest.mark.parametrize("library", ["timm", "huggingface_hub"])
def test_a_slow_import_happens_only_where_it_is_needed(library: str) -> None:
    """``--help`` and the jobs of a ResNet do without it."""
    for name, path in modules().items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                named = [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
                assert library not in {one.partition(".")[0] for one in named}, name


def test_folders_are_small_enough_to_read() -> None:
    sizes = Counter(path.parent.relative_to(PACKAGE).as_posix() for path in modules().values())
    assert {folder: files for folder, files in sizes.items() if files > MOST_FILES} == {}


def test_no_file_repeats_its_folders_name() -> None:
    assert [name for name in modules() if "." in name and _repeats(*name.split(".")[-2:])] == []


def _repeats(folder: str, stem: str) -> bool:
    return stem.startswith((f"{folder}_", f"{folder.removesuffix('s')}_"))


def test_a_stem_means_one_thing() -> None:
    stems = Counter(name.rpartition(".")[2] for name in modules() if name not in OLD_PATHS)
    assert {stem: count for stem, count in stems.items() if count > 2 and stem not in SAME_STEM} == {}


@pytest.mark.parametrize("name", sorted(OLD_PATHS))
def test_an_old_path_only_hands_names_on(name: str) -> None:
    kinds = {type(one) for one in ast.parse(modules()[name].read_text(encoding="utf-8")).body}
    assert kinds <= {ast.Expr, ast.ImportFrom, ast.Assign}
