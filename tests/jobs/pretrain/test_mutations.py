"""The suite catches what goes wrong silently in distributed contrastive training: each fault below, made on purpose in
a copy of the package, must fail a test that passes without it.

    bash tests/run.sh -m slow tests/jobs/pretrain/test_mutations.py
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.jobs import ROOT


class Mutation(NamedTuple):
    """A fault: ``old`` becomes ``new`` in a file of the package, and ``tests`` (pytest's -k) must notice."""

    name: str
    file: str
    old: str
    new: str
    test_file: str
    tests: str


STEP = "jobs/pretrain/test_distributed_step.py"
FSDP = "jobs/pretrain/test_fsdp.py"
TUNED = "jobs/pretrain/test_tuned_step.py"
DEVICES = "jobs/pretrain/test_devices.py"
PROTOCOL = "jobs/evaluation/test_finetune_protocol.py"
MUTATIONS = [
    Mutation(
        "NT-Xent's gradient is W times too large", "methods/nt_xent.py",
        "[(z1_BD, grad1_BD), (z2_BD, grad2_BD)]", "[(z1_BD, grad1_BD * 2), (z2_BD, grad2_BD * 2)]",
        "unit/methods/test_ca2cl.py", "gradients_in_double_precision",
    ),
    Mutation(
        "anchors do not pull on the rows that they are compared with", "methods/nt_xent.py",
        "log_z_N = torch.cat(rows.gather(*log_z[:local, None].chunk(2))).squeeze(1)",
        "log_z_N = log_z.new_full((2 * pairs,), float('inf'))",
        "unit/methods/test_ca2cl.py", "gradients_in_double_precision",
    ),
    Mutation(
        "the second NT-Xent forgets the weight of same-slide negatives", "methods/ca2cl/losses.py",
        "found = _nt_xent(z2_BD, z_adv_BD, rows, config)", "found = nt_xent(z2_BD, z_adv_BD, rows, config.temperature)",
        "jobs/pretrain/test_same_slide.py", "gradient_is_that_of_slow_loops and 1-1-exact-objective0",
    ),
    Mutation(
        "the positive counts as a same-slide negative", "methods/nt_xent.py",
        "same_RN.scatter_(1, self.positive_R[:, None], False)", "pass",
        "unit/methods/test_same_slide.py", "value_and_gradient",
    ),
    Mutation(
        "the clusters' gradient is W times too large", "methods/ca2cl/losses.py",
        "(x, grad[rows.own])", "(x, grad[rows.own] * world()[1])",
        STEP, "gives_the_gradient_of_one and 2-1-sync-objective0",
    ),
    Mutation(
        "the engine forgets that its wrapper averages", "training/engine.py",
        "whole = loss * self.accelerator.num_processes", "whole = loss * 1",
        "jobs/pretrain/test_engines.py", "gives_the_run_of_one_process and cpu-2",
    ),
    Mutation(
        "the direction is a rank's own", "methods/ca2cl/method.py",
        "perturbation(all_sum(gradient), weight,", "perturbation(gradient, weight,",
        STEP, "gives_the_gradient_of_one and 2-1-sync-objective0",
    ),
    Mutation(
        "the direction is a rank's own, in the cached path", "methods/ca2cl/grad_cache.py",
        "perturbation(all_sum(gradient), weight,", "perturbation(gradient, weight,",
        STEP, "gives_the_gradient_of_one and 2-2-lane_group-objective",
    ),
    Mutation(
        "the adversarial pass moves running statistics", "methods/ca2cl/method.py",
        "embed_first(engine.network, views, step, record=False)",
        "embed_first(engine.network, views, step, record=True)",
        STEP, "only_the_clean_passes",
    ),
    Mutation(
        "the adversarial pass moves running statistics, in the cached path", "methods/ca2cl/grad_cache.py",
        "(to_z_adv[number], None), step, record=False)", "(to_z_adv[number], None), step, record=True)",
        STEP, "only_the_clean_passes",
    ),
    Mutation(
        "FSDP2 divides a gradient that is summed", "training/fsdp.py",
        "sharded.set_gradient_divide_factor(1.0)", "sharded.set_gradient_divide_factor(2.0)",
        FSDP, "gradients_are_those_of_one_process",
    ),
    Mutation(
        "the direction leaves out the strong view on a sharded engine", "methods/ca2cl/grad_cache.py",
        "direction += delta.grad", "direction += 0.0 * delta.grad",
        FSDP, "gradients_are_those_of_one_process",
    ),
    Mutation(
        "the adversarial pass without graph moves running statistics", "methods/ca2cl/grad_cache.py",
        "parts = [embed_first(engine.bare, views, step, record=False).z for",
        "parts = [embed_first(engine.bare, views, step, record=True).z for",
        STEP, "only_the_clean_passes",
    ),
    Mutation(
        "sync's backward pass is a rank's own", "models/sync_batch_norm.py",
        "dist.all_reduce(sums_2C.div_(world_size()))", "sums_2C.div_(world_size())",
        STEP, "gives_the_gradient_of_one and 2-1-sync-objective0",
    ),
    Mutation(
        "sync's own parameters get W times their gradient", "models/sync_batch_norm.py",
        "return grad_x, sums_2C[1], sums_2C[0], None", "return grad_x, *(sums_2C * world_size()).flip(0), None",
        STEP, "gives_the_gradient_of_one and 2-1-sync-objective0",
    ),
    Mutation(
        "the step waits for a number of the device", "methods/ca2cl/losses.py",
        "(~valid).to(adversarial.dtype) / world()[1]", "adversarial.new_tensor(not valid.item()) / world()[1]",
        DEVICES, "a_training_step_runs",
    ),
    Mutation(
        "the feed leaves the rows' places on the CPU", "pretrain/batches.py",
        "(x.to(self._device, non_blocking=True) for x in (tiles, numbers_2B))",
        "(tiles.to(self._device, non_blocking=True), numbers_2B)",
        DEVICES, "a_training_step_runs",
    ),
    Mutation(
        "the views' table stays on the CPU", "views/gpu/render.py",
        "there = to_device(torch.from_numpy(np.concatenate(parts, dtype=np.float32)), tiles.device)",
        "there = torch.from_numpy(np.concatenate(parts, dtype=np.float32))",
        DEVICES, "views_are_made_where",
    ),
    Mutation(
        "running statistics of lane_group are a rank's own", "models/batch_norm.py",
        '        dist.all_reduce(together)\n', "",
        STEP, "gives_the_gradient_of_one and 2-1-lane_group",
    ),
    Mutation(
        "both views are grouped alike", "models/bn_groups.py",
        ".view(-1, self.group, self.groups).transpose(1, 2).reshape(rows)", "",
        "unit/models/test_bn_groups.py", "",
    ),
    Mutation(
        "bitwise adds in single precision", "methods/bitwise.py",
        "torch.zeros_like(self.value, dtype=torch.float64)", "torch.zeros_like(self.value)",
        STEP, "bitwise_is_the_same_to_the_last_bit and frozen-4-1",
    ),
    Mutation(
        "DeepSpeed steps twice", "training/deepspeed.py",
        "        self.network.step()\n", "        self.network.step()\n        self.network.step()\n",
        "jobs/pretrain/test_engines.py", "gives_the_run_of_one_process and deepspeed_zero2-2-8",
    ),
    Mutation(
        "ranks do not agree on an overflow", "training/engine.py",
        "ShardedGradScaler(device) if processes > 1 else torch.amp.GradScaler(device)", "torch.amp.GradScaler(device)",
        "jobs/pretrain/test_half_precision.py", "deepspeed_zero2-fp16",
    ),
    Mutation(
        "DistributedDataParallel writes buffers between the passes", "runtime/accelerator.py",
        "(broadcast_buffers=False,", "(broadcast_buffers=True,",
        STEP, "three_forwards",
    ),
    Mutation(
        "labels are drawn with replacement by either protocol", "evaluation/splits.py",
        "        if protocol.replacement:", "        if True:",
        PROTOCOL, "drawn_with_replacement",
    ),
    Mutation(
        "tiles that were split off are labelled by the original protocol", "evaluation/finetune/original.py",
        "np.flatnonzero(~validation(protocol, count, share, seed))", "np.arange(count)",
        PROTOCOL, "split_off",
    ),
    Mutation(
        "the test tiles choose the epoch by either protocol", "evaluation/finetune/trial.py",
        "if protocol.selects_on_test:\n            return", "if True:\n            return",
        PROTOCOL, "have_no_say",
    ),
    Mutation(
        "nothing but held-out tiles chooses the epoch by either protocol", "evaluation/finetune/trial.py",
        "if protocol.selects_on_test:\n            return", "if False:\n            return",
        PROTOCOL, "have_no_say",
    ),
    Mutation(
        "the weak view's rows draw for others", "methods/two_views.py",
        "*(word[order] for word in words)", "*words",
        TUNED, "order_of_rows",
    ),
    Mutation(
        "bitwise gives every unit the first one's draws", "methods/bitwise.py",
        "self.draws.rows(number * len(rows), len(rows), len(x))", "self.draws.rows(0, len(rows), len(x))",
        TUNED, "rows_leave_out and test_vit-bitwise",
    ),
    Mutation(
        "statistics are recorded again in the backward pass", "models/batch_norm.py",
        "self.slot, self._replays = slot, True", "self.slot, self._replays = slot, False",
        "unit/models/test_recompute.py", "statistics_are_the_same and test_resnet",
    ),
    Mutation(
        "recomputed blocks draw as the pass that was last", "models/blocks/drop_path.py",
        "return partial(self.draws.set, self.draws.table_LB)", "return nullcontext",
        "unit/models/test_recompute.py", "statistics_are_the_same and test_vit",
    ),
    Mutation(
        "a step that was skipped is averaged", "training/ema.py",
        "(~skipped).double()", "skipped.logical_or(~skipped).double()",
        "unit/training/test_ema.py", "definition_to_the_last_bit",
    ),
    Mutation(
        "moments go to parameters in the network's order", "training/engine.py",
        'for group in self.optimizer.param_groups for parameter in group["params"]]',
        "for parameter in self.bare.parameters()]",
        "unit/training/test_param_groups.py", "goes_on_bit_for_bit or one_group_to_many",
    ),
]  # fmt: skip


def test_every_fault_can_still_be_made() -> None:
    for mutation in MUTATIONS:
        text = (ROOT / "ca2cl" / mutation.file).read_text(encoding="utf-8")
        assert text.count(mutation.old) == 1, mutation.name
        assert (ROOT / "tests" / mutation.test_file).is_file(), mutation.name


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name.replace(" ", "_"))
def test_a_fault_is_caught(tmp_path: Path, mutation: Mutation) -> None:
    for folder in ("ca2cl", "tests", "accelerate_configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file = tmp_path / "ca2cl" / mutation.file
    text = file.read_text(encoding="utf-8")
    command = [
        sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/{mutation.test_file}",
        "-k", mutation.tests,
        "-m", "",  # slow ones too
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def passes() -> bool:
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode in (0, 1), done.stdout  # 5: nothing was selected
        return done.returncode == 0

    assert passes(), "fails without the fault, too"
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    assert not passes(), "not noticed"
