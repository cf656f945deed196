"""``import ca2cl``: its names, their documentation, and what the import costs."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import ca2cl


def test_the_import_brings_no_torch() -> None:
    code = "import sys, ca2cl; assert set(ca2cl.__all__) <= set(dir(ca2cl)); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ca2cl.__all__)
def test_every_name_is_there_and_documented(name: str) -> None:
    found = getattr(ca2cl, name)
    assert inspect.getdoc(found), name
    for part, member in inspect.getmembers(found, inspect.isfunction) if inspect.isclass(found) else []:
        if not part.startswith("_") and member.__module__.startswith("ca2cl."):
            assert inspect.getdoc(member), f"{name}.{part}"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'ca2cl' has no attribute 'antigravity'"):
        ca2cl.antigravity  # noqa: B018


def test_help_says_shapes_dtypes_ranges_and_errors() -> None:
    text = inspect.getdoc(ca2cl.load_encoder) or ""
    assert all(word in text for word in ("uint8", "[0, 255]", "(B, 3, S, S)", "(B, D)", "float32", "Raises"))


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "Encoder": ("uint8", "[0, 255]", "(B, 3, S, S)", "(B, D)"),
        "ShardDataset": ("uint8", "(3, H, W)", "[0, 255]", "int64 (N,)", "Raises"),
        "Transform": ("uint8 [0, 255]", "float32 (3, S, S)"),
        "Views": ("float32, bfloat16 or float16", "Raises", "Example"),
        "cluster_loss": ("(B, D)", "float64", "at least 0", "Raises"),
        "embed": ("uint8", "[0, 255]", "(N, H, W, 3)", "float32 (N, D)", "Raises", "Example"),
        "nt_xent": ("(B, D)", "float64", "at least 0", "Raises"),
    }.items(),
)
def test_help_of_every_name_says_what_goes_in_and_comes_out(name: str, words: tuple[str, ...]) -> None:
    text = inspect.getdoc(getattr(ca2cl, name)) or ""
    assert [word for word in words if word not in text] == []
