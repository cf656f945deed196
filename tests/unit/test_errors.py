"""The error that users see: one line, whatever it quotes."""

import copy

from ca2cl.errors import InputError


def test_an_error_is_one_printable_line_of_bounded_length() -> None:
    assert str(InputError("a.json: damaged ('x\r\n\ty')")) == "a.json: damaged ('x y')"
    assert str(InputError("name \x1b[31;1mred\x1b[0m\x07\x1b")) == "name red??"
    assert str(InputError("Gewebe ü 组织")) == "Gewebe ü 组织"
    long = str(InputError(f"first {'x' * 5000} last"))
    assert len(long) < 2000 and long.startswith("first x") and long.endswith("x last")
    assert str(copy.copy(InputError("as a worker hands it on"))) == "as a worker hands it on"
