"""The step, the loop, checkpoints, preemption, schedules. Knows a method only by its ``step``."""
