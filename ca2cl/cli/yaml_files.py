"""Translate YAML settings into command-line flags, so both are parsed alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ca2cl.errors import InputError, nearest

_YAML = "tag:yaml.org,2002:"
_NULL, _MERGE = f"{_YAML}null", f"{_YAML}merge"
_KINDS = {yaml.ScalarNode: "one value", yaml.SequenceNode: "a list", yaml.MappingNode: "a group of settings"}


def read_flags(
    path: str, types: Mapping[str, str], required: frozenset[str], group: str = ""
) -> Iterator[tuple[str, list[str]]]:
    """Each setting of a YAML file: its dotted name and the words that its flag would have.

    Values are taken as they are written, as on the command line, so quotes change nothing. A
    group without settings, or a file without any, says nothing; neither does a null for a setting that has no default,
    which is how ``--print_config`` shows what is still to be given.

    Args:
        types: the type of every setting by its dotted name; a group's is empty.
        required: settings without a default.
        group: whose settings they are, all of them.

    Raises:
        InputError: no such file, not YAML, or not a mapping of known settings to values. Names file and line.
    """
    for name, node in _settings(path, _read(path), group and f"{group}.", types):
        words, optional = _words(path, name, node), types[name].endswith("| None")
        if isinstance(node, yaml.SequenceNode) and "tuple" not in types[name]:
            raise _wrong(path, node, f"{name} is a list: give one value")
        if node.tag != _NULL:
            yield name, words
        elif optional:
            yield name, ["null"]
        elif name not in required:
            raise _wrong(path, node, f"{name} has no value: give one, or take the line out")


def read_tree(path: str) -> dict[str, Any]:
    """A YAML file of settings as nested mappings; values are text as it is written, or lists of it.

    Raises:
        InputError: no such file, not YAML, or something else than settings. Names file and line.
    """
    root = _read(path)
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"config {path!r} has no settings; give them by name, such as seeds: 3")
    return _tree(path, root, "")


def _tree(path: str, node: yaml.MappingNode, prefix: str) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in node.value:
        name = _key(path, key)
        if isinstance(value, yaml.MappingNode) and not _is_tagged(value):
            tree[name] = _tree(path, value, f"{prefix}{name}.")
            continue
        words = ["null"] if value.tag == _NULL else _words(path, prefix + name, value)
        tree[name] = words if isinstance(value, yaml.SequenceNode) else words[0]
    return tree


def _read(path: str) -> yaml.Node | None:
    try:
        # bytes: the reader then finds the encoding, and what is no text
        loader = yaml.SafeLoader(Path(path).expanduser().read_bytes())
        node = loader.get_single_node()
        for mapping in _mappings(node):
            _check_twice(path, mapping)
            loader.flatten_mapping(mapping)  # merges, <<: *base
    except OSError as error:
        raise InputError(f"config {path!r} cannot be read ({error.strerror}); give a file of YAML") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"config {path!r}{line}: not YAML ({error.problem or error}); correct it there") from None
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        raise InputError(f"config {path!r} cannot be read ({str(error)[:200]}); give a file of YAML in UTF-8") from None
    return node


def _mappings(node: yaml.Node | None) -> Iterator[yaml.MappingNode]:
    if isinstance(node, yaml.MappingNode):
        yield node
        yield from [value for _, value in node.value if isinstance(value, yaml.MappingNode)]


def _settings(
    path: str, node: yaml.Node | None, prefix: str, types: Mapping[str, str]
) -> Iterator[tuple[str, yaml.Node]]:
    if node is None or node.tag == _NULL:
        return
    if not isinstance(node, yaml.MappingNode) or _is_tagged(node):
        what = prefix.rstrip(".") or "the file"
        raise _wrong(path, node, f"{what} holds {_what(node)}: give settings by name, such as seed: 1")
    for key, value in node.value:
        name = prefix + _key(path, key)
        if name not in types:
            beside = [known for known in types if known.startswith(prefix)]
            raise _wrong(path, key, f"unknown setting {name}: {nearest(name, beside)}")
        if types[name]:
            yield name, value
        else:
            yield from _settings(path, value, f"{name}.", types)


def _check_twice(path: str, node: yaml.MappingNode) -> None:
    seen = set[str]()
    for key, _ in node.value:
        name = _key(path, key)
        if name in seen and key.tag != _MERGE:
            raise _wrong(path, key, f"{name} is there twice: keep one of them")
        seen.add(name)


def _key(path: str, key: yaml.Node) -> str:
    if not isinstance(key, yaml.ScalarNode):
        raise _wrong(path, key, "a setting's name is one word")
    return str(key.value).replace("-", "_")


def _words(path: str, name: str, node: yaml.Node) -> list[str]:
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    for item in items:
        hole = item.tag == _NULL and item is not node
        if hole or _is_tagged(item) or not isinstance(item, yaml.ScalarNode):
            raise _wrong(path, item, f"{name} holds {_what(item)}: give {'a value' if item is node else 'values'}")
    return [str(item.value) for item in items]


def _is_tagged(node: yaml.Node) -> bool:
    """True for a node that names a program's own type, which is never built here."""
    return not node.tag.startswith(_YAML) or "/" in node.tag


def _what(node: yaml.Node) -> str:
    if _is_tagged(node):
        return str(node.tag)
    return "nothing" if node.tag == _NULL else _KINDS[type(node)]


def _wrong(path: str, node: yaml.Node, what: str) -> InputError:
    return InputError(f"config {path!r}, line {node.start_mark.line + 1}: {what}")
