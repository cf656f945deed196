"""What no module of the package may do: found in the syntax tree, so that neither a comment nor an alias hides it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ca2cl

PACKAGE = Path(ca2cl.__file__).parent
UNPICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib", "jsonpickle"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn"}
SHELLS |= {"asyncio.create_subprocess_shell"}
RUNS = {"eval", "exec", "compile", "__import__", "runpy.run_path", "runpy.run_module", "builtins.eval", "builtins.exec"}
YAML = {"yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.Loader"}
YAML |= {"yaml.UnsafeLoader", "yaml.FullLoader", "yaml.CLoader", "yaml.full_load_all"}
LOADERS = {"pandas.read_pickle", "pandas.read_hdf", "torch.hub.load"}
LOADERS |= {f"mlflow.{flavour}.load_model" for flavour in ("pyfunc", "pytorch", "sklearn")}
MAY_EXTRACT = {"tarfile.open", "tarfile.TarFile", "shutil.unpack_archive"}
SPAWNS = {"subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_call", "subprocess.check_output"}
# who starts a program, and of what it is started: fixed words, the verbs of the quickstart, those of a study behind a
# launcher that only the command line names, or MLflow's server, whose address and port are arguments of their own
MAY_SPAWN = {"cli/quickstart.py", "cli/ui.py", "tracking/environment.py", "study/children.py"}


def aliases(tree: ast.AST) -> dict[str, str]:
    """Local name → what was imported under it."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for one in node.names:
                found[one.asname or one.name.partition(".")[0]] = one.name if one.asname else one.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for one in node.names:
                found[one.asname or one.name] = f"{node.module}.{one.name}"
    return found


def dotted(node: ast.AST, known: dict[str, str]) -> str:
    """The full name that an expression spells, or nothing."""
    if isinstance(node, ast.Name):
        return known.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value, known)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def keyword(call: ast.Call, name: str) -> object:
    """Value of a keyword that is a plain constant, None where it is not given."""
    return next((getattr(one.value, "value", ...) for one in call.keywords if one.arg == name), None)


def faults(source: str, name: str = "x.py") -> Iterator[str]:
    """What a module does that it may not, line by line."""
    tree = ast.parse(source)
    known = aliases(tree)
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [one.name for one in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{name}:{line} imports {one}" for one in modules if one.partition(".")[0] in UNPICKLERS)
        if isinstance(node, (ast.Name, ast.Attribute)):
            full = dotted(node, known)
            if full in SHELLS | YAML | LOADERS | MAY_EXTRACT or full.startswith(("os.exec", "os.spawn")):
                yield f"{name}:{line} uses {full}"
            if full in SPAWNS and name not in MAY_SPAWN:
                yield f"{name}:{line} starts a program"
        if isinstance(node, ast.Call):
            yield from (f"{name}:{line} {told}" for told in call_faults(node, dotted(node.func, known), name))


def call_faults(call: ast.Call, called: str, name: str) -> Iterator[str]:
    """What is wrong with one call."""
    if called in RUNS:
        yield f"calls {called}"
    if called in ("torch.load", "torch.serialization.load") and keyword(call, "weights_only") is not True:
        yield "calls torch.load without weights_only=True"
    if called.endswith("get_state_dict") and keyword(call, "weights_only") is not True:
        yield "downloads weights without weights_only=True"
    if keyword(call, "allow_pickle") not in (None, False):
        yield "allows pickles"
    if keyword(call, "trust_remote_code") not in (None, False):
        yield "trusts remote code"
    merges = isinstance(call.func, ast.Attribute) and call.func.attr == "merge_from_file"
    if merges and keyword(call, "allow_unsafe") is not False:
        yield "lets a configuration of detectron2 run code"
    if keyword(call, "shell") not in (None, False):
        yield "opens a shell"
    if called in ("json.loads", "json.load") and name != "common/records.py" and not _of_our_own(call):
        yield f"calls {called} instead of parse_json"


def _of_our_own(call: ast.Call) -> bool:
    return (
        isinstance(call.args[0], ast.Call)
        and isinstance(call.args[0].func, ast.Attribute)
        and (call.args[0].func.attr == "dumps")
    )


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_no_module_unpickles_runs_text_or_opens_a_shell() -> None:
    found = [told for path in modules() for told in faults(path.read_text(), str(path.relative_to(PACKAGE)))]
    assert len(modules()) > 150 and found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads as harmless",
        "import joblib.numpy_pickle as j",
        "def f():\n    import dill",
        "import torch as t\nt.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "from torch import load\nload('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import yaml as y\ny.load('x', Loader=None)",
        "from yaml import unsafe_load",
        "from yaml import unsafe_load as u\nu('x')",
        "import os\nos.system('x')",
        "from os import system\nsystem('x')",
        "import subprocess\nsubprocess.run('x', shell=True)",
        "import subprocess as s\ns.run(['x'])",
        "import os\nos.execvp('x', [])",
        "eval('x')",
        "import tarfile\ntarfile.open('x').extractall()",
        "import shutil\nshutil.unpack_archive('x')",
        "import pandas as pd\npd.read_pickle('x')",
        "import mlflow\nmlflow.pyfunc.load_model('x')",
        "import datasets\ndatasets.load_dataset('x', trust_remote_code=True)",
        "cfg.merge_from_file('x')",
        "import json\njson.loads(path.read_text())",
    ],
)
def test_each_of_them_is_found(source: str) -> None:
    used = source if source != "from yaml import unsafe_load" else source + "\nunsafe_load('x')"
    assert list(faults(used))


@pytest.mark.parametrize(
    "source",
    ["import tarfile\ntarfile.TarInfo('x')", "import yaml\nyaml.safe_load('x')", "# pickle.loads\nx = 'os.system'",
     "import torch\ntorch.load('x', weights_only=True)", "import json\njson.loads(json.dumps(1))", "self.eval()"],
)  # fmt: skip
def test_harmless_code_is_not(source: str) -> None:
    assert not list(faults(source))
