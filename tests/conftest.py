"""Every test runs on the CPU with one intra-op thread, and away from the user's own MLflow."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from ca2cl.runtime.signals import StopFlag
from tests.support.migrated import FOLDER, copy_migrated_stores

LOAD = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}  # times are the machine's load
hypothesis.settings.register_profile("same", derandomize=True, **LOAD)  # what fails here fails everywhere
hypothesis.settings.register_profile("other", derandomize=False, **LOAD)  # --hypothesis-profile other looks further
hypothesis.settings.load_profile("same")
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # the tests' tiles lie on the CPU; without a GPU this changes nothing

LONG = (
    "pretrain/test_engines",
    "detection/test_train",
    "evaluation/test_finetune_protocol",
    "pretrain/test_distributed_step",
    "evaluation/test_finetune",
    "pretrain/test_pretrain",
    "report/test_report",
    "export/test_export",
    "pretrain/test_numerics",
    "reproduce/test_nct",
    "launch/test_launch",
    "launch/test_doctor",
    "tracking/test_outage",
    "data/test_bad_data",
)
"""Files of ``tests/jobs`` that take minutes, the longest first."""
LONG_UNITS = ("views/test_gpu", "data/test_synthetic", "pretrain/test_needs", "models/test_group_batch_norm")
"""Files of ``tests/unit`` that would end a run alone, a core idle beside them."""


def pytest_configure(config: pytest.Config) -> None:
    """Ctrl-C is tested in processes that inherit what this one ignores, as it does where a script started it by &."""
    if FOLDER not in os.environ:  # the workers of xdist inherit it
        folder = os.environ[FOLDER] = tempfile.mkdtemp(prefix="ca2cl-stores-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two workers share the files in this order: a long one that came last would leave the other worker idle."""
    tests = Path(__file__).parent
    first = [*(tests / "jobs" / f"{name}.py" for name in LONG), *(tests / "unit" / f"{name}.py" for name in LONG_UNITS)]
    place = {path: number for number, path in enumerate(first)}
    items.sort(key=lambda item: place.get(item.path, len(first)))


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("CA2CL_CONFIG", "")
    torch.set_num_threads(1)
    copy_migrated_stores()
    yield


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """A job in the tests' process takes its signals, and ends it at a second one: the next test's are its own."""
    before = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    }
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        if isinstance(getattr(handler, "__self__", None), StopFlag):  # of a job that a fixture ran
            handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, handler)
