"""Learning rate as a pure function of the step.

A resumed run has nothing to restore.
"""

from __future__ import annotations

import math

from ca2cl.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """The rate of optimizer step number ``step`` (from 0) of ``total_steps``.

    A linear warm-up over ``warmup_steps`` (its last step reaches the peak), then half a cosine to 0 over what is
    left, changed every step or at the start of every epoch. With restarts (SGDR, Loshchilov and Hutter,
    arXiv 1608.03983, equation 5) half a cosine over ``restart_epochs`` epochs, changed at the start of every epoch.

    Args:
        config: peak, schedule and warm-up.
        step: from 0.
        total_steps: of the run.
        steps_per_epoch: of the data.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine_restarts":
        turn = (step // steps_per_epoch % config.restart_epochs) / config.restart_epochs
        return config.lr * 0.5 * (1 + math.cos(math.pi * turn))
    if config.schedule == "cosine_epoch":
        step = max(config.warmup_steps, step - step % steps_per_epoch)
        # Whole epochs, as the paper counts them; a run cut short inside one still ends its cosine with it.
        total_steps = math.ceil(total_steps / steps_per_epoch) * steps_per_epoch
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
