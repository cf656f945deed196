"""An installed ca2cl, from the folder that holds the clone: where users are after `git clone`."""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.jobs import ROOT


@pytest.mark.parametrize("kind", ["editable", "wheel"])
def test_the_clone_in_the_working_directory_is_not_taken_for_the_package(tmp_path: Path, kind: str) -> None:
    """A folder `ca2cl` without `__init__.py` is a namespace package, which an import hook would not override."""
    clone = tmp_path / "ca2cl"
    shutil.copytree(ROOT / "ca2cl", clone / "ca2cl", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    script = f"import setuptools.build_meta as b; b.build_{kind}({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", script], cwd=clone, check=True, capture_output=True)
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    (site,) = (tmp_path / "env").glob("lib/python3*/site-packages")
    (built,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(site)
    # what it depends on, behind it on the path
    (site / "zz_dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    command = [str(tmp_path / "env" / "bin" / "python"), "-m", "ca2cl", "--version"]
    done = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("ca2cl "), done.stderr
