"""Layer numbers of a body's parameters, by timm's ``group_matcher``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from torch import nn

Matcher = Mapping[str, Any]
"""What ``group_matcher`` of a timm model returns: regular expressions for the stem and for the blocks."""
_HEAD = "head of another module"


def layer_numbers(names: Iterable[str], matcher: Matcher) -> dict[str, int]:
    """The layer of every parameter that ``matcher`` knows, from 0, the stem's, without gaps.

    Parameters that it does not know (timm's head norms) are left out: timm trains those like heads.
    """
    from timm.models import group_parameters

    named: Any = SimpleNamespace(named_parameters=lambda: [(name, None) for name in (*names, _HEAD)])
    numbers: dict[str, int] = group_parameters(named, dict(matcher), reverse=True)
    heads = numbers.pop(_HEAD)
    return {name: number for name, number in numbers.items() if number != heads}


def block_modules(module: nn.Module, layers: Mapping[str, int]) -> list[nn.Module]:
    """The modules of several operations whose parameters are of one layer behind the stem, the outermost, in order.

    Lists and sequences of modules do not count: a body may call their members one by one.

    Args:
        module: a body.
        layers: numbers of its parameters' layers.
    """
    return list(_blocks(module, [(name, layers.get(name, 0)) for name, _ in module.named_parameters()], ""))


def _blocks(module: nn.Module, numbered: list[tuple[str, int]], prefix: str) -> Iterator[nn.Module]:
    inside = [(name, number) for name, number in numbered if name.startswith(prefix)]
    numbers = {number for _, number in inside}
    children = [(name, child) for name, child in module.named_children() if any(True for _ in child.parameters())]
    if not children or not numbers - {0}:
        return
    if len(numbers) == 1 and not isinstance(module, (nn.ModuleList, nn.Sequential)):
        yield module
        return
    for name, child in children:
        yield from _blocks(child, inside, f"{prefix}{name}.")
