"""Ranks and gathering. Without a process group there is one process, and every function does nothing."""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def world_size() -> int:
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process' number, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def gather(rows: Tensor) -> Tensor:
    """The rows of all processes, in rank order: `[B, ...]` -> `[G, ...]`; the same number of rows everywhere.

    Gradients flow back to the process a row came from, summed over all processes that used it.
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows)  # pyright: ignore[reportAssignmentType]
    return gathered


class _Gather(torch.autograd.Function):
    """`all_gather` whose backward pass sums over processes; the one in torch.distributed has no gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())
        ctx.count = rows.shape[0]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total[rank() * ctx.count : (rank() + 1) * ctx.count]
