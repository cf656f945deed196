"""Records in JSON: nothing is converted, and a fault names file, field, value and remedy in one line."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest
from annotated_types import Gt, Len

from ca2cl.common.records import Count, DamagedRecord, Number, parse_record, read_fields, read_record
from ca2cl.errors import InputError


@dataclass(frozen=True)
class Tiles:
    __pydantic_config__ = {"allow_inf_nan": False, "extra": "forbid"}

    count: Count
    std: Annotated[tuple[Annotated[Number, Gt(0)], ...], Len(3, 3)] = (1, 1, 1)
    names: dict[str, str] = field(default_factory=dict)
    schema_version: int = 1

    def __post_init__(self) -> None:
        if self.count == 13:
            raise ValueError("count is 13, which brings bad luck")


def parse(text: str) -> Tiles:
    return parse_record(text, Tiles, "a.json", "make it again", newest=1)


def test_a_record_is_an_instance_with_its_numbers_as_they_are_written() -> None:
    found = parse('{"count": 3, "std": [1, 0.5, 2], "names": {"a": "b"}}')
    assert found == Tiles(3, (1, 0.5, 2), {"a": "b"})
    assert repr(found.std) == "(1, 0.5, 2)"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"count": "3"}, "count is '3' (should be a valid integer)"),
        ({"count": True}, "count is True (should be a valid integer)"),
        ({"count": 3.0}, "count is 3.0 (should be a valid integer)"),
        ({"count": -1}, "count is -1 (should be greater than or equal to 0)"),
        ({"count": 2**63}, "count is 9223372036854775808 (should be less than"),
        ({"std": [1, 1, float("nan")]}, "std is [1, 1, nan] (should be a finite number)"),
        ({"std": [1, 1, float("inf")]}, "std is [1, 1, inf] (should be a finite number)"),
        ({"std": [1, 1, 10**400]}, "std is [1, 1, 1000"),
        ({"std": [1, 1, False]}, "std is [1, 1, False] ("),
        ({"std": [1, 1, 0]}, "std is [1, 1, 0] (should be greater than 0)"),
        ({"std": [1, 1]}, "std is [1, 1] ("),
        ({"std": "abc"}, "std is 'abc' (should be a valid array)"),
        ({"names": {"a": None}}, "names is {'a': None} (should be a valid string)"),
        ({"other": 1}, "other is 1 ("),
        ({"count": 13}, "count is 13, which brings bad luck"),
    ],
)
def test_a_wrong_field_is_named_with_its_value(change: dict[str, Any], told: str) -> None:
    with pytest.raises(DamagedRecord) as caught:
        parse(json.dumps({"count": 3} | change))
    line = str(caught.value)
    assert line.startswith(f"a.json: damaged, {told}") and line.endswith("; make it again") and len(line) < 400


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{}", "lacks count"),
        ("[]", "should be an object"),
        ("", "not JSON"),
        ('{"count": "\\ud800"}', "Invalid JSON"),
        ('{"count": ' + "9" * 5000 + "}", ""),
        ("[" * 100_000, "not JSON (nested too deeply)"),
    ],
)
def test_what_is_no_record_is_one_line(text: str, told: str) -> None:
    with pytest.raises(DamagedRecord, match="^a.json: damaged, .*; make it again$") as caught:
        parse(text)
    assert told in str(caught.value)


def test_a_newer_schema_is_no_damage_whatever_its_fields() -> None:
    with pytest.raises(InputError, match="^a.json: schema 2 is newer than this version's 1; upgrade ca2cl$") as caught:
        parse('{"schema_version": 2}')
    assert not isinstance(caught.value, DamagedRecord)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(DamagedRecord, match="a.json: no tiles here$"):
        read_record(path, Tiles, "make it again", absent="no tiles here")
    with pytest.raises(DamagedRecord, match="a.json: no such file; make it again$"):
        read_fields(path, ("x",), "make it again")
    with pytest.raises(DamagedRecord, match="cannot be read .*; make it again$"):
        read_fields(tmp_path, ("x",), "make it again")
    path.write_text('{"x": 1}')
    assert read_fields(path, ("x",), "make it again") == {"x": 1}
    with pytest.raises(DamagedRecord, match="a.json: damaged, lacks y, z; make it again$"):
        read_fields(path, ("x", "y", "z"), "make it again")
