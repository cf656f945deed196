"""A page taken apart again."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

_VOID = {"meta", "img", "input", "br", "link", "hr"}


class Page(HTMLParser):
    """Every element with its attributes, and the text of those that are asked for."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    @property
    def text(self) -> str:
        """What a reader sees."""
        return " ".join(" ".join(text for tag, text in self.texts if tag not in ("script", "style")).split())

    def all(self, tag: str, kind: str = "") -> list[dict[str, str]]:
        return [
            held for name, held in self.elements if name == tag and (not kind or kind in held.get("class", "").split())
        ]

    @property
    def data(self) -> dict[str, Any]:
        (held,) = (text for tag, text in self.texts if tag == "script" and text.startswith("{"))
        return dict(json.loads(held))

    def missing(self) -> list[str]:
        return re.findall(r"Missing: (.*?)(?= Missing:|$)", self.text)
