"""Runs several processes in a test, connected by gloo on this machine; an error in one of them fails the test."""

import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.multiprocessing.spawn import ProcessRaisedException, spawn

SECONDS = 1200  # long, because a machine may be very busy; a deadlock still ends


def run(world: int, work: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """Results of `work(rank, *arguments)` in each of `world` processes, by rank: tensors or containers of them."""
    folder.mkdir(parents=True, exist_ok=True)
    group = spawn(_process, (world, str(folder), work, arguments), world, join=False)
    assert group is not None
    until = time.monotonic() + SECONDS
    try:
        while not group.join(timeout=5):
            assert time.monotonic() < until, f"{world} processes do not end; they may wait for one another"
    except ProcessRaisedException as error:
        pytest.fail(str(error), pytrace=False)
    finally:
        for process in group.processes:
            if isinstance(process, SpawnProcess):
                process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def _process(rank: int, world: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", timedelta(seconds=SECONDS), world, rank)
    try:
        torch.save(work(rank, *arguments), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def mean(tensor: Tensor) -> Tensor:
    """The mean over processes, as data parallelism computes it for gradients."""
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def mean_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Mean gradients of all trained parameters; a gradient that a process does not have counts as 0."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: mean(torch.zeros_like(p) if p.grad is None else p.grad) for name, p in named.items()}
