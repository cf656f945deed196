"""The documentation site: it builds without a warning, and its links lead somewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("furo")
pytest.importorskip("myst_parser")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the site is made of; the working tree stays as it is."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "docs", tree / "docs", ignore=shutil.ignore_patterns("_build", "settings"))
    return tree


def made(tree: Path, out: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "docs/build.sh", str(tree / out)],
        cwd=tree,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_site_builds_and_every_link_leads_somewhere(build: Path) -> None:
    done = made(build, "html")
    assert done.returncode == 0, done.stdout + done.stderr
    site = build / "html"
    assert (site / "settings" / "pretrain.html").read_text(encoding="utf-8").count("--optim.lr") == 1
    assert "<math" in (site / "mathematics.html").read_text(encoding="utf-8")
    broken = []
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        for link in re.findall(r'(?:href|src)="([^"]+)"', text):
            if "://" in link or link.startswith(("mailto:", "data:")):
                continue
            file, _, anchor = unquote(link).partition("#")
            target = (path.parent / file.partition("?")[0]).resolve() if file else path
            missing = not target.is_file() or (
                anchor and target.suffix == ".html" and f'id="{anchor}"' not in target.read_text(encoding="utf-8")
            )
            if missing:
                broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []


@pytest.mark.slow
def test_a_broken_link_fails_the_build(build: Path) -> None:
    page = build / "docs" / "data.md"
    page.write_text(page.read_text(encoding="utf-8") + "\n[nowhere](nowhere.md)\n", encoding="utf-8")
    done = made(build, "broken")
    assert done.returncode != 0
    assert "nowhere.md" in done.stderr
