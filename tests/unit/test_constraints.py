"""docker/constraints.txt, the versions in the image, beside setup.cfg."""

from __future__ import annotations

import configparser
import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.jobs import ROOT

BY_ARGUMENT = {"torch", "torchvision"}  # of the Dockerfile, and with them CUDA's libraries


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "docker" / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert len({one.name for one in found}) == len(found)
    return {canonicalize_name(one.name): one for one in found}


def requirements() -> list[Requirement]:
    """Of the package and of every extra that an image may have."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = {name: lines for name, lines in setup["options.extras_require"].items() if name not in ("test", "docs")}
    lines = "\n".join([setup["options"]["install_requires"], *extras.values()]).splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("wanted", requirements(), ids=lambda one: str(one.name))
def test_the_image_has_a_tested_version_of_every_dependency(wanted: Requirement) -> None:
    if wanted.name in BY_ARGUMENT:
        return
    version = str(pins()[canonicalize_name(wanted.name)].specifier).removeprefix("==")
    assert wanted.specifier.contains(version), version


def test_every_line_is_one_exact_version_and_none_is_of_torch_or_cuda() -> None:
    for name, pin in pins().items():
        assert re.fullmatch(r"==[^,*]+", str(pin.specifier)) and not pin.url and not pin.extras, pin
        assert name not in BY_ARGUMENT and not name.startswith(("nvidia-", "cuda-", "triton")), pin


def test_the_tracking_server_is_of_the_clients_version() -> None:
    (server,) = re.findall(r"mlflow\[auth\](==[\d.]+)", (ROOT / "docker" / "mlflow.Dockerfile").read_text())
    assert str(pins()["mlflow"].specifier) == server
