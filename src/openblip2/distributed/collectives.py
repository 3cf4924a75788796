"""The processes that train together, the rows of their joined batch, and the tensors that they exchange.

Each process has some rows of one joined batch of `G` rows, in rank order; the numbers of rows may differ. Its losses
are weighted (`Share.weigh`) so that their mean over processes, and the mean gradient that data parallelism computes,
equal those of one process with the joined batch.

Without a process group there is one process, and nothing is sent. All processes must call these functions in the same
order.

Shapes: B rows here, G rows over all processes.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from openblip2.errors import UserError

PATIENCE = timedelta(days=7)  # timeout for processes that wait while one of them prepares the data of all

_here = threading.local()  # per thread, because `alone` must not affect the thread that makes batches


def world_size() -> int:
    """Number of processes that train together; 1 without a process group, and within `alone`."""
    distributed = dist.is_available() and dist.is_initialized() and not getattr(_here, "alone", False)
    return dist.get_world_size() if distributed else 1


def rank() -> int:
    """The rank of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that writes files and prints; also within `alone`."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


@contextmanager
def alone() -> Iterator[None]:
    """Runs the block, in this thread, as if there were one process: for validation, which all processes run alike."""
    before = getattr(_here, "alone", False)
    _here.alone = True
    try:
        yield
    finally:
        _here.alone = before


def part_of(count: int, rank: int, world: int) -> slice:
    """The rows of process `rank` of `world` in a batch of `count` rows; the numbers of rows differ by one at most."""
    return slice(rank * count // world, (rank + 1) * count // world)


@dataclass(frozen=True)
class Share:
    """Which rows of the joined batch belong to this process."""

    counts: tuple[int, ...]  # number of rows in each process
    rank: int  # of this process
    sums: tuple[int, ...] = ()  # the sum over processes of each of the other numbers given to `share`
    most: tuple[int, ...] = ()  # the largest value over processes of each of them

    @property
    def one(self) -> bool:
        """Whether there is only one process."""
        return len(self.counts) == 1

    @property
    def total(self) -> int:
        """G, the number of rows in the joined batch."""
        return sum(self.counts)

    @property
    def first(self) -> int:
        """The index of this process' first row in the joined batch."""
        return sum(self.counts[: self.rank])

    @property
    def own(self) -> slice:
        """This process' rows of the joined batch."""
        return slice(self.first, self.first + self.counts[self.rank])

    def weigh(self, mean: Tensor, count: int | Tensor, total: int | Tensor) -> Tensor:
        """Weights a mean over `count` items here so that its mean over processes is that over all `total` items."""
        if self.one:
            return mean
        own, everywhere = int(count), max(1, int(total))
        # The mean of no items is NaN. It is not replaced by a new zero, because all processes need the same graph.
        return (mean if own else mean.nan_to_num(0.0)) * (len(self.counts) * own / everywhere)


def share(rows: int, *others: int | Tensor) -> Share:
    """Exchanges how many `rows` of the joined batch each process has (at least one), and sums and maxima of others."""
    if world_size() == 1:
        return Share((rows,), 0)
    own = torch.tensor([rows, *map(int, others)])
    numbers = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(numbers, own, group=patient_group())
    counts, *more = zip(*(part.tolist() for part in numbers), strict=True)
    if not any(counts):
        raise UserError("no process can open a picture of this batch: skipped.jsonl says what is wrong with each")
    return Share(counts, rank(), tuple(map(sum, more)), tuple(map(max, more)))


@cache
def patient_group() -> "dist.ProcessGroup":
    """A CPU group of all processes, for long waits and for a few numbers that need not wait for the GPU's queue."""
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(group, dist.ProcessGroup)
    return group


def gather(rows: Tensor, shared: Share | None = None) -> Tensor:
    """Gathers the rows of all processes in rank order: `[B, ...]` -> `[G, ...]`. `shared=None`: equal row counts.

    Gradients flow back to the process a row came from, summed over all processes that used it.
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows, shared or Share((len(rows),) * world_size(), rank()))  # pyright: ignore[reportAssignmentType]
    return gathered


def transpose(rows: Tensor, shared: Share) -> Tensor:
    """Turns this process' rows `[B, G]` of a matrix `[G, G]` into those of its transpose; gradients flow back."""
    # Each number is sent only to the process that needs it. The similarities of all images to this process' texts thus
    # cost `B x G` numbers; gathering the images would cost `G x Q x E`.
    if world_size() == 1:
        return rows.T
    count = len(rows)
    sent = torch.cat([block.T.reshape(-1) for block in rows.split(shared.counts, dim=1)])
    sizes = [count * other for other in shared.counts]
    received: Tensor = _AllToAll.apply(sent, sizes, sizes)  # pyright: ignore[reportAssignmentType]
    blocks = zip(received.split(sizes), shared.counts, strict=True)
    return torch.cat([block.view(count, other) for block, other in blocks], dim=1)


@dataclass(frozen=True)
class Route:
    """Which rows this process sends to each process, and how many it receives from each."""

    sent: tuple[int, ...]  # the rows of this process that are sent, those for process 0 first
    sends: tuple[int, ...]  # number of rows sent to each process
    receives: tuple[int, ...]  # number of rows received from each process
    places: tuple[int, ...]  # each wanted row's position in our own rows followed by those received; -1: none wanted
    idle: bool  # whether no process sends anything


def plan_route(wanted: Sequence[Sequence[int]], shared: Share) -> Route:
    """Plans how each process gets its `wanted` rows of the joined batch (-1: none); repeated rows are sent once."""
    # Every process computes the whole plan from the same numbers, so that no communication is needed.
    ends = [sum(shared.counts[: n + 1]) for n in range(len(shared.counts))]
    owns = [range(end - count, end) for end, count in zip(ends, shared.counts, strict=True)]
    remote = [
        sorted({row for row in rows if row >= 0 and row not in own}) for rows, own in zip(wanted, owns, strict=True)
    ]
    ours, needed = owns[shared.rank], remote[shared.rank]
    sent = [[row - ours.start for row in rows if row in ours] for rows in remote]
    positions = {row: len(ours) + n for n, row in enumerate(needed)}
    positions |= {row: row - ours.start for row in ours} | {-1: -1}
    return Route(
        tuple(row for rows in sent for row in rows),
        tuple(map(len, sent)),
        tuple(sum(row in own for row in needed) for own in owns),
        tuple(positions[row] for row in wanted[shared.rank]),
        not any(remote),
    )


def fetch_rows(rows: Tensor, route: Route) -> Tensor:
    """Gets the wanted rows of other processes, each once, in the joined order: own `[B, ...]` -> theirs `[n, ...]`.

    Gradients, if any are needed, flow back the same way.
    """
    if route.idle:
        return rows[:0]
    sent = rows.index_select(0, torch.tensor(route.sent, dtype=torch.int64, device=rows.device))
    fetched: Tensor = _AllToAll.apply(sent, list(route.sends), list(route.receives))  # pyright: ignore[reportAssignmentType]
    return fetched


def mean_over_processes(values: Sequence[float]) -> list[float]:
    """The mean of each number over all processes, used to log losses."""
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, group=patient_group())
    return (total / world_size()).tolist()


class _Gather(torch.autograd.Function):
    """`all_gather` for different numbers of rows; the backward pass sums gradients over processes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, shared: Share) -> Tensor:
        # `all_gather` needs equal numbers of rows in all processes.
        padded = rows.new_zeros(max(shared.counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in shared.counts]
        dist.all_gather(parts, padded)
        ctx.own = shared.own
        return torch.cat([part[:count] for part, count in zip(parts, shared.counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.own], None


class _AllToAll(torch.autograd.Function):
    """`all_to_all_single` with given numbers of rows to and from each process; gradients are sent back the same way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sends: list[int], receives: list[int]) -> Tensor:
        ctx.sends, ctx.receives = sends, receives
        received = rows.new_empty(sum(receives), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), receives, sends)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        back = grads[0].new_empty(sum(ctx.sends), *grads[0].shape[1:])
        dist.all_to_all_single(back, grads[0].contiguous(), ctx.sends, ctx.receives)
        return back, None, None
