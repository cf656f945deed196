"""Sphinx configuration of the documentation site; ``bash docs/build.sh`` builds it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from docutils import nodes  # noqa: E402
from latex2mathml.converter import convert  # noqa: E402
from notebook_pages import write_pages as write_notebooks  # noqa: E402
from settings_pages import write_pages  # noqa: E402

import ca2cl  # noqa: E402

project = "ca2cl"
version = release = ca2cl.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"ca2cl {release}"
html_static_path = ["pictures"]
html_css_files = ["site.css"]
html_show_copyright = False
exclude_patterns = ["_build"]
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath", "deflist"]
smartquotes = False  # `--flag` in a docstring is two hyphens
html_math_renderer = "mathml"  # readable without a network, unlike MathJax
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_use_ivar = True
myst_fence_as_directive = ["math"]
suppress_warnings = ["myst.header"]

PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}
"""Files of the repository's root that are pages of the site."""


def at_home(text: str) -> str:
    """A text whose links to files of the root, and to notebooks, lead to their pages."""
    text = text.replace("](LICENSE)", "](https://creativecommons.org/licenses/by-nc/4.0/)").replace("](docs/", "](")
    for file, page in PAGES.items():
        text = text.replace(f"](../{file}", f"]({page}").replace(f"]({file}", f"]({page}")
    return re.sub(r"\]\(notebooks/(\w+)\.ipynb", r"](notebooks/\1.md", text)


def write_math(writer: Any, node: nodes.math | nodes.math_block) -> None:
    """Write a formula as MathML, which browsers draw by themselves."""
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    writer.body.append(convert(node.astext(), display=display))
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Called by Sphinx before it reads the pages."""
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))
    app.connect("source-read", lambda _, __, source: source.__setitem__(0, at_home(source[0])))
    write_pages(HERE / "settings")
    write_notebooks(HERE / "notebooks")
    for file, page in PAGES.items():
        (HERE / page).write_text((HERE.parent / file).read_text(encoding="utf-8"), encoding="utf-8")
