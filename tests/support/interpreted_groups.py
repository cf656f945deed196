"""BatchNorm over groups by Triton's interpreter, from a file of cases to one of results. For a process of its own, with
TRITON_INTERPRET=1: that is read when kernels are defined."""

from __future__ import annotations

import sys

import torch

from ca2cl.models.group_batch_norm import fused_group_batch_norm


def main() -> None:
    given, made = sys.argv[1:]
    results = []
    for x, weight, bias, outer, group, eps in torch.load(given, weights_only=True):
        leaves = [part.requires_grad_() for part in (x, weight, bias)]
        out, mean_GC, variance_GC = fused_group_batch_norm(*leaves, group, eps)
        results.append([out.detach(), mean_GC, variance_GC, *torch.autograd.grad(out, leaves, outer)])
    torch.save(results, made)


if __name__ == "__main__":
    main()
