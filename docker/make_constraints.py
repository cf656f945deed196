"""Writes docker/constraints.txt: one version of everything that an image may hold, as pip chooses them today.

    python docker/make_constraints.py     # Linux, Python 3.11 as in the image; installs nothing

Without torch, torchvision and CUDA's libraries, whose versions are arguments of the Dockerfile.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CA2CL = f"{HERE.parent}[deepspeed,s3,gcs,export,detection,slides]"
# what detectron2's setup.py asks for at the Dockerfile's commit, which cannot be resolved without a compiler
DETECTRON2 = (
    "black", "cloudpickle", "fvcore>=0.1.5,<0.1.6", "hydra-core>=1.1", "iopath>=0.1.7,<0.1.10", "omegaconf>=2.1,<2.4",
    "tabulate", "tensorboard", "termcolor>=1.1", "yacs>=0.1.8",
)  # fmt: skip
BUILD = ("ninja", "pip", "setuptools", "wheel")
NOT_HERE = ("ca2cl", "cuda-", "nvidia-", "torch", "triton")
HEAD = "# Versions that were tested together. Made by docker/make_constraints.py; used by docker/Dockerfile.\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        choose = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        subprocess.run([*choose, "--report", str(report), CA2CL, *DETECTRON2, *BUILD], check=True)
        chosen = [one["metadata"] for one in json.loads(report.read_text())["install"]]
    lines = (f"{one['name']}=={one['version']}\n" for one in chosen if not one["name"].startswith(NOT_HERE))
    (HERE / "constraints.txt").write_text(HEAD + "".join(sorted(lines, key=str.lower)))


if __name__ == "__main__":
    main()
