"""Patients and grades of images, from the table beside them.

The challenge's ``Grade.csv`` has the columns ``name``, ``patient ID``, ``grade (GlaS)`` and
``grade (Sirinukunwattana et al. 2015)``; copies call it ``index.csv`` and spell the columns otherwise.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from ca2cl.data.sources.image_folder import EXTENSIONS
from ca2cl.detection.prepare.layouts import Archive, Picture
from ca2cl.errors import InputError

TABLES = ("grade.csv", "index.csv", "patients.csv")
Facts = dict[str, str]
"""Of an image: ``patient_id``, ``grade`` and ``grade_2015``, as far as the table has them."""


def read_patients(archive: Archive, source: Path) -> tuple[Path | None, dict[str, Facts]]:
    """The table in the layout's folder or in ``source``, if there is one: image name, or split/name, → facts.

    Raises:
        InputError: two tables in one folder, or one that is no table of patients.
    """
    for folder in dict.fromkeys((archive.root, source)):
        found = sorted(path for path in folder.iterdir() if path.name.lower() in TABLES)
        if len(found) > 1:
            raise InputError(f"{found[1]}: lies beside {found[0].name}; keep the one that is right")
        if found:
            return found[0], _read(found[0])
    return None, {}


def facts_of(picture: Picture, table: Path | None, patients: Mapping[str, Facts]) -> Facts:
    """Facts of an image from the table; none without a table.

    Raises:
        InputError: the table leaves the image out, so that nobody could keep its patient apart.
    """
    if table is None:
        return {}
    for name in (f"{picture.split}/{picture.name}", picture.name):
        if name in patients:
            return patients[name]
    raise InputError(f"{table}: has no row for {picture.name}; add it, or rename the table if it is of other images")


def _read(path: Path) -> dict[str, Facts]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            columns = {name: key for name in rows.fieldnames or () if (key := _column(name))}
            if "name" not in columns.values() or len(set(columns.values())) < 2:
                raise InputError(f"{path}: needs the column name, and patient_id or grade; rename it if it is no such")
            return _facts(path, columns, rows)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a table of comma-separated UTF-8 text ({error}); save it as that") from None


def _facts(path: Path, columns: Mapping[str, str], rows: csv.DictReader[str]) -> dict[str, Facts]:
    patients: dict[str, Facts] = {}
    for row in rows:
        facts = {key: (row[column] or "").strip() for column, key in columns.items()}
        name = facts.pop("name")
        if name.rpartition(".")[2].lower() in EXTENSIONS:
            name = name.rpartition(".")[0]
        facts = {key: value for key, value in facts.items() if value}
        if patients.setdefault(name, facts) != facts:
            raise InputError(f"{path}: has two rows for {name} that differ; keep the one that is right")
    return patients


def _column(name: str) -> str | None:
    """Our name of a column."""
    words = "".join(letter if letter.isalnum() else " " for letter in name.lower()).split()
    if words in (["name"], ["image"]):
        return "name"
    if words[:1] == ["patient"]:
        return "patient_id"
    if words[:1] == ["grade"]:
        return "grade_2015" if "2015" in words else "grade"
    return None
