"""Commands in the documents are ones that the command line takes."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from ca2cl.cli.examples import EXAMPLES
from ca2cl.cli.parser import parse
from ca2cl.cli.verbs import VERBS
from ca2cl.errors import InputError

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"^```(?:bash|sh|console)\n(.*?)^```", re.DOTALL | re.MULTILINE)
BEFORE = re.compile(r"|-m|\w+=.*|.*bin/|&&|\|\||\||;|bash|exec|srun")
"""Words that a command may follow; none at the beginning of a line."""
ENDS = {"&&", "||", "|", ";", "&", ">", "2>", ">>"}


def commands(text: str) -> Iterator[list[str]]:
    """Words of every ``ca2cl`` command in the blocks of shell code, behind launchers and variables."""
    for block in CODE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            places = [
                n for n, word in enumerate(words) if word == "ca2cl" and BEFORE.fullmatch("".join(words[n - 1 : n]))
            ]
            if not places or (words[places[-1] + 1 : places[-1] + 2] in ([], ["launch"])):
                continue
            found = words[places[-1] + 1 :]
            ends = [n for n, word in enumerate(found) if word in ENDS]
            yield [word for word in found[: min(ends, default=len(found))] if word != "..."]


TEXTS = [path.read_text(encoding="utf-8") for path in DOCUMENTS]
for notebook in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
    sources = ("".join(cell["source"]) for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"])
    TEXTS += [f"```bash\n{re.sub('^!', '', text, flags=re.MULTILINE)}\n```\n" for text in sources if text[:1] == "!"]
TEXTS += [f"```bash\n{line}\n```\n" for lines in EXAMPLES.values() for _, line in lines]
DOCUMENTED = sorted({tuple(words) for text in TEXTS for words in commands(text)})


def name_of(words: tuple[str, ...]) -> str:
    """The verb, of one word or two."""
    return two if (two := " ".join(words[:2])) in VERBS else words[0]


@pytest.mark.parametrize("words", DOCUMENTED, ids=" ".join)
def test_a_documented_command_parses(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    if "--plan" in words and words[0] == "doctor":
        words = ("doctor", "plan", *(word for word in words[1:] if word != "--plan"))
    parse(name_of(words), list(words[len(name_of(words).split()) :]))


def test_commands_are_found() -> None:
    text = "```bash\nX=1 ca2cl launch -n 2 -m ca2cl probe --train \\\n  a ...  # b\nca2cl launch x\nls ca2cl\n```\n"
    assert list(commands(text)) == [["probe", "--train", "a"]]
    assert len(DOCUMENTED) > 50
    with pytest.raises(InputError, match="unknown setting"):
        parse("probe", ["--trainn", "a"])
