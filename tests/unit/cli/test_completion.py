"""Tab completion, by a real bash."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from ca2cl.cli import main
from ca2cl.cli.verbs import VERBS

TRIED = {
    "ca2cl pre": "pretrain",
    "ca2cl encoders sh": "show",
    "ca2cl encoders list --me": "--metrics",
    "ca2cl pretrain --optim.layer": "--optim.layer_decay",
    "ca2cl pretrain --recipe crc": "crc5_small",
    "ca2cl pretrain --model.norm ": "sync frozen lane_group",
    "ca2cl doctor --recipe cr": "crop crc5_small",
    "ca2cl detect predict --tru": "--truth",
    "ca2cl detect p": "prepare predict",
    "ca2cl completion ": "bash zsh",
    "ca2cl shard tiles/": "",  # files, which bash completes by itself
}
TRY = """
try() { IFS=' ' read -ra COMP_WORDS <<< "$1"; [[ "$1" == *' ' ]] && COMP_WORDS+=("")
    COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 )); COMPREPLY=(); _ca2cl; echo "${COMPREPLY[*]}"; }
"""


def test_bash_completes_verbs_settings_and_values(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = capfd.readouterr().out
    tried = "".join(f"try '{line}'\n" for line in [*TRIED, "ca2cl "])
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run([bash, "--norc", "-c", script + TRY + tried], capture_output=True, text=True, check=True)
    *found, first = done.stdout.splitlines()
    assert done.stderr == "" and dict(zip(TRIED, found, strict=True)) == TRIED
    assert {name.partition(" ")[0] for name in VERBS} <= set(first.split())


def test_zsh_gets_the_same_script_behind_its_bash_functions(capfd: pytest.CaptureFixture[str]) -> None:
    scripts = []
    for shell in ("bash", "zsh"):
        assert main(["completion", shell]) == 0
        scripts.append(capfd.readouterr().out)
    assert scripts[1].endswith(scripts[0]) and "bashcompinit" in scripts[1].removesuffix(scripts[0])
