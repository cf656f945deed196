"""A verb's settings by name, with their types in words."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

_ONE = {float: "a number", int: "a whole number", str: "a text", bool: "true or false"}
_MANY = {float: "numbers", int: "whole numbers", str: "texts"}
_PLACE = {float: "NUMBER", int: "N", str: "TEXT", bool: "true|false"}
REQUIRED = object()
"""Default of a setting that must be given."""


class Field(NamedTuple):
    """A setting.

    Attributes:
        name: dotted name, without hyphens in front.
        hint: type, with optional parts.
        default: value that it has where it is not given; ``REQUIRED`` if it must be.
        text: its explanation.
    """

    name: str
    hint: Any
    default: Any
    text: str


class Group(NamedTuple):
    """Settings that stand together: the verb's own, whose name is empty, or those of a nested dataclass."""

    name: str
    text: str
    fields: list[Field]


def groups_of(kind: type, prefix: str = "") -> Iterator[Group]:
    """The groups of a verb's settings, its own first."""
    from docstring_parser import parse_from_object

    bases = [base for base in reversed(kind.__mro__) if dataclasses.is_dataclass(base)]  # fields may be inherited
    texts = {entry.arg_name: entry.description or "" for base in bases for entry in parse_from_object(base).params}
    hints, own, inner = typing.get_type_hints(kind), list[Field](), list[tuple[type, str]]()
    for field in dataclasses.fields(kind):
        name, hint = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            inner.append((hint, f"{name}."))
        else:
            own.append(Field(name, hint, _default(field), " ".join(texts.get(field.name, "").split())))
    yield Group(prefix.rstrip("."), _description(kind), own)
    for group, below in inner:
        yield from groups_of(group, below)


def _description(kind: type) -> str:
    """A dataclass's docstring, one line a paragraph."""
    paragraphs = (kind.__doc__ or "").strip().split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else REQUIRED


def shown(value: Any) -> str:
    """A default as the command line takes it."""
    if value is REQUIRED:
        return "required"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return " ".join(map(shown, value)) or "[]"
    return str(value) if value != "" else '""'


def expected(hint: Any) -> str:
    """The values that a setting of this type takes, in words: ``a number, auto or none``."""
    return _listed([words for part in _parts(hint) for words in _values(part)])


def choices(hint: Any) -> list[str]:
    """The words that a setting of this type takes, where it takes nothing else."""
    found = [words for part in _parts(hint) if part is not types.NoneType for words in _values(part)]
    literal = all(typing.get_origin(part) is Literal for part in _parts(hint) if part is not types.NoneType)
    return found if literal else []


def placeholder(hint: Any) -> str:
    """The value of a setting in a line of help: ``N``, ``TEXT``, ``sync|frozen``."""
    for part in _parts(hint):
        if typing.get_origin(part) is tuple:
            inner = typing.get_args(part)
            one = placeholder(inner[0])
            return f"{one} ..." if inner[-1] is Ellipsis else " ".join([one] * len(inner))
    words = [
        word
        for part in _parts(hint)
        if part is not types.NoneType
        for word in (map(str, typing.get_args(part)) if typing.get_origin(part) is Literal else [_PLACE[part]])
    ]
    return "|".join(words)


def _parts(hint: Any) -> list[Any]:
    """The members of a union, or the type alone."""
    if typing.get_origin(hint) is typing.Annotated:
        return _parts(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [inner for part in typing.get_args(hint) for inner in _parts(part)]
    return [hint]


def _values(part: Any) -> list[str]:
    """The values of a type without alternatives."""
    if part is types.NoneType:
        return ["none"]
    if typing.get_origin(part) is Literal:
        return [str(word) for word in typing.get_args(part)]
    if typing.get_origin(part) is tuple:
        inner = typing.get_args(part)
        if words := choices(inner[0]):
            return [f"one or more of {_listed(words)}"]
        many = _MANY[_parts(inner[0])[0]]
        return [f"{many}, separated by spaces" if inner[-1] is Ellipsis else f"{len(inner)} {many}"]
    return [_ONE[part]]


def _listed(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
