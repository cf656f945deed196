"""Checkpoints written until SIGKILL, again and again: ``python -m tests.support.checkpoint_writer FOLDER ROUNDS SEED``.

One process imports torch and forks a writer a round; it kills the writer at a random instant, looks for a checkpoint
as a run would that starts again, and says as JSON what it found. Every tensor of step s holds s, so a checkpoint of two
steps' files would show.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from ca2cl.config import OptimConfig
from ca2cl.runtime.accelerator import build_accelerator
from ca2cl.training.checkpoint import Checkpointer, read_state, restore
from ca2cl.training.engine import AccelerateEngine
from ca2cl.training.optim import build_optimizer

LONGEST = 0.15  # seconds until a writer is killed: several checkpoints


def write(keeper: Checkpointer, engine: AccelerateEngine, step: int) -> None:
    """The checkpoint of ``step``."""
    with torch.no_grad():
        for parameter in engine.bare.parameters():
            parameter.fill_(step)
    keeper.save(step, engine, {"told": step})


def check(keeper: Checkpointer, engine: AccelerateEngine) -> int:
    """The step of the checkpoint that a run would go on from, restored."""
    path = keeper.latest()
    if path is None:
        return 0
    restore(path, engine)
    state = read_state(path)
    values = {float(value) for held in engine.bare.state_dict().values() for value in (held.min(), held.max())}
    assert values == {float(state["step"])} and state["told"] == state["step"], (path, values, state)
    return int(state["step"])


def main(folder: Path, rounds: int, seed: int) -> None:
    """Write, kill, look."""
    torch.set_num_threads(1)
    network, draw = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300)), random.Random(seed)
    accelerator = build_accelerator()
    engine = AccelerateEngine(accelerator, network, build_optimizer(OptimConfig(name="sgd", lr=0.1), network), "no")
    keeper = Checkpointer(folder, keep_last=2)
    valid, torn, steps = 0, 0, [0]
    for _ in range(rounds):
        child = os.fork()
        if child == 0:
            try:
                for step in range(steps[-1] + 1, steps[-1] + 10_000):
                    write(keeper, engine, step)
            finally:
                os._exit(1)
        time.sleep(draw.uniform(0, LONGEST))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "the writer ended by itself"
        torn += any(folder.glob(".step-*.tmp"))
        steps.append(check(keeper, engine))
        assert steps[-1] >= steps[-2], "a checkpoint was lost"
        valid += 1
    sys.stdout.write(json.dumps({"rounds": rounds, "valid": valid, "killed_while_writing": torn, "steps": steps[-1]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
