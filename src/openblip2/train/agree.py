"""What the processes of a run tell each other beside tensors of the model: flags and a few lines of JSON.

Without a process group there is one process, and every function answers for it alone. All processes must call.
"""

import json
from typing import Any

import torch
from torch import distributed as dist

from openblip2.distributed import patient_group, world_size


def highest(values: list[int]) -> list[int]:
    """The largest of each whole number over all processes."""
    if world_size() == 1:
        return values
    found = torch.tensor(values)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=patient_group())
    return found.tolist()


def from_first(value: int) -> int:
    """The whole number that the first process has."""
    if world_size() == 1:
        return value
    found = torch.tensor([value])
    dist.broadcast(found, src=0, group=patient_group())
    return int(found)


def from_all(value: Any) -> list[Any]:
    """What every process has, in the order of ranks: anything that JSON can say, as which it travels."""
    if world_size() == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode("ascii")), dtype=torch.uint8)
    (longest,) = highest([len(text)])
    padded = torch.full((longest,), ord(" "), dtype=torch.uint8)
    padded[: len(text)] = text
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded, group=patient_group())
    return [json.loads(bytes(part.tolist())) for part in parts]


def wait_for_all() -> None:
    """Returns when every process has come here."""
    highest([0])
