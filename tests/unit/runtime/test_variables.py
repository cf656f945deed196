"""What accelerate reads from the environment changes no result: a verdict on each variable."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from ca2cl.errors import InputError
from ca2cl.runtime.launched import RENDEZVOUS
from ca2cl.runtime.variables import KEPT, REFUSED, settle_variables
from tests.support.jobs import ROOT, start

VERDICTS = {
    "ACCELERATE_": "taken out of the environment, unless KEPT or refused",
    "FSDP_": "read for ACCELERATE_USE_FSDP only, which is refused",
    "MEGATRON_LM_": "read for ACCELERATE_USE_MEGATRON_LM only, which is refused",
    "PARALLELISM_CONFIG_": "read for ACCELERATE_USE_PARALLELISM_CONFIG only, which is refused",
    **{name: "the place in a launch, which find_place checks" for name in (*RENDEZVOUS, "WORLD_SIZE")},
    "LOCAL_WORLD_SIZE": "the place in a launch, which find_place checks",
    "PMI_": "MPI's: a launcher's WORLD_SIZE, RANK and LOCAL_RANK come first, and otherwise forget_place takes it",
    "MPI_LOCAL": "MPI's",
    "OMPI_COMM_WORLD_": "MPI's",
    "MV2_COMM_WORLD_": "MPI's",
    "OMP_NUM_THREADS": "threads: a sum's rounding; bitwise fixes them",
    "NCCL_IB_DISABLE": "the wire",
    "NCCL_P2P_DISABLE": "the wire",
    "USE_TORCH_XLA": "TPUs: build_accelerator refuses what is neither CPU nor CUDA",
    "XLA_": "TPUs",
    "TPU_NAME": "accelerate's launcher in a notebook, which nothing here uses",
    "PJRT_DEVICE": "accelerate's launcher in a notebook",
    "NODE_RANK": "accelerate's launcher in a notebook",
    "NPROC": "accelerate's launcher in a notebook",
    "FORK_LAUNCHED": "only shown",
    "PT_HPU_LAZY_MODE": "another device",
    "DEEPSPEED_USE_HPU": "another device",
    "PYTORCH_ENABLE_MPS_FALLBACK": "another device",
    "AWS_": "accelerate's launcher for SageMaker",
    "CLEARML_": "accelerate's own trackers, which nothing here uses",
    "MLFLOW_": "accelerate's own trackers; ours name store, experiment and run (below)",
    "FOO": "an example in a docstring",
}


def read_by_accelerate() -> set[str]:
    """Every variable that accelerate's source reads from the environment."""
    spec = importlib.util.find_spec("accelerate")
    assert spec is not None and spec.submodule_search_locations is not None
    (root,) = spec.submodule_search_locations
    reads = (
        r'environ(?:\.get|\.setdefault|\.pop)?\s*[\(\[]\s*"(\w+)"',
        r'(?:parse_flag_from_env|parse_choice_from_env|getenv)\(\s*"(\w+)"',
        r'"(\w+)" (?:not )?in os\.environ',
        r'prefix = "([A-Z0-9_]+)"',
    )
    found: set[str] = set()
    for path in Path(root).rglob("*.py"):
        if {"test_utils", "commands"}.isdisjoint(path.parts):
            text = path.read_text(encoding="utf-8")
            found.update(name for pattern in reads for name in re.findall(pattern, text))
            for names in re.findall(r"get_int_from_env\(\s*\[([^\]]*)\]", text):
                found.update(re.findall(r'"(\w+)"', names))
    return found


def test_every_variable_that_accelerate_reads_has_a_verdict() -> None:
    found = read_by_accelerate()
    assert {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "RANK", "PMI_SIZE", "FSDP_"} <= found
    unknown = {name for name in found if not name.startswith(tuple(VERDICTS))}
    assert not unknown, f"may they change a result? {sorted(unknown)}"


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_not_done_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, REFUSED[name][0].upper())
    settle_variables()
    monkeypatch.setenv(name, "1")
    with pytest.raises(InputError, match=f"{name} is '1'"):
        settle_variables()


def test_what_a_job_script_left_changes_no_accelerator(tmp_path: Path) -> None:
    """In a process of its own: some are read once, when torch or accelerate is imported."""
    script = """
import logging, os, torch
logging.basicConfig()
from ca2cl.runtime.accelerator import build_accelerator
a = build_accelerator()
print(a.gradient_accumulation_steps, a.mixed_precision, a.state.dynamo_plugin.backend.value, a.distributed_type.value,
      torch.get_float32_matmul_precision(), *sorted(name for name in os.environ if name.startswith("ACCELERATE_")))
"""
    left = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_GRADIENT_CLIPPING": "1.0", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_TORCH_DEVICE": "meta",
        "ACCELERATE_DOWNCAST_BF16": "1", "ACCELERATE_SOMETHING_NEW": "1", "ACCELERATE_LOG_LEVEL": "INFO",
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
    }  # fmt: skip
    done = start([sys.executable, "-c", script], tmp_path, **left)
    assert done.stdout.split() == ["1", "no", "NO", "NO", "highest", "ACCELERATE_LOG_LEVEL"], done.stderr
    for name, setting in [("MIXED_PRECISION is bf16", "run.precision"), ("STEPS is 4", "run.micro_batch_size")]:
        assert f"{name} in the environment: left out, {setting} decides" in done.stderr


def test_mlflow_is_asked_by_name_alone() -> None:
    """MLFLOW_RUN_ID, MLFLOW_EXPERIMENT_ID and their kin say where the fluent functions log; a client has arguments."""
    fluent = re.compile(r"mlflow\.(start_run|log_\w+|set_\w+|register_model|active_run|search_runs)\(")
    found = [path for path in (ROOT / "ca2cl").rglob("*.py") if fluent.search(path.read_text(encoding="utf-8"))]
    assert not found
    client = (ROOT / "ca2cl" / "store" / "open.py").read_text(encoding="utf-8")
    assert "MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)" in client


def test_what_is_kept_is_no_more_than_named() -> None:
    accelerate = {name for name in read_by_accelerate() if name.startswith(KEPT)}
    assert {"ACCELERATE_USE_CPU", "ACCELERATE_DEEPSPEED_ZERO_STAGE"} <= accelerate
    assert not accelerate & {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_MIXED_PRECISION"}
