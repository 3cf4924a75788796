"""The order in which the samples of shards are used: a function of the seed and of the number of a sample.

The shards of an epoch are shuffled and assigned to lanes (`data.open_shards` of them, or one per shard if there are
fewer), each one to the shortest lane so far. One sample is taken from each lane in turn; a lane goes through its shards
one after the other, each in a shuffled order of its own. So only few shards are open at a time, neighbours in the order
come from different shards, and processes share no shard if their number divides the number of lanes.

The parts of a mixture take turns of one row (one sample of each lane): of every `sum(weights)` rows, each part gets
exactly as many as its weight, in a new random order. The order of each part is endless, epoch after epoch.
"""

import functools
import hashlib
import heapq
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from openblip2.errors import UserError

MOST_WEIGHT = 100_000  # sum over all parts, because all turns of a cycle are drawn at once


class Spot(NamedTuple):
    """Where a sample is: lane, epoch, shard of the part, and place in that shard's shuffled order."""

    lane: int
    epoch: int
    shard: int
    place: int


class Order:
    """The endless order of one part: `order(position)` -> `Spot`.

    Args:
        counts: number of samples in each shard.
        lanes: number of shards that are read at the same time.
        name: of the part, so that the parts of a mixture are shuffled differently.

    Raises:
        UserError: there is no sample.
    """

    def __init__(self, counts: Sequence[int], lanes: int, seed: int, name: str = "") -> None:
        self.counts, self.seed, self.name, self.samples = counts, seed, name, sum(counts)
        if not self.samples:
            raise UserError(f"{name or 'the shards'}: no samples: give shards with images and captions")
        self.lanes = min(lanes, sum(count > 0 for count in counts))
        self._epoch = functools.lru_cache(maxsize=3)(self._draw_epoch)
        # (epoch, shard) -> the shuffled order of the shard: the numbers of its samples, by place.
        self.within = functools.lru_cache(maxsize=2 * lanes)(self._draw_within)

    def __call__(self, position: int) -> Spot:
        epoch, place = divmod(position, self.samples)
        return Spot(*self._epoch(epoch).find(place, epoch))

    def after(self, spot: Spot) -> tuple[int, int]:
        """The epoch and shard that follow a spot's shard in its lane."""
        shards = self._epoch(spot.epoch).shards[spot.lane]
        next_ = shards.index(spot.shard) + 1
        if next_ < len(shards):
            return spot.epoch, shards[next_]
        return spot.epoch + 1, self._epoch(spot.epoch + 1).shards[spot.lane][0]

    def _draw_within(self, epoch: int, shard: int) -> list[int]:
        random = generator(self.seed, "shard", self.name, epoch, shard)
        return torch.randperm(self.counts[shard], generator=random).tolist()

    def _draw_epoch(self, number: int) -> "_Epoch":
        random = generator(self.seed, "epoch", self.name, number)
        return _Epoch(self.counts, torch.randperm(len(self.counts), generator=random).tolist(), self.lanes)


class _Epoch:
    """The lanes of one epoch: the shards of each lane, and the position in the lane at which each shard begins."""

    def __init__(self, counts: Sequence[int], shuffled: Sequence[int], lanes: int) -> None:
        self.shards: list[list[int]] = [[] for _ in range(lanes)]
        lengths = [(0, lane) for lane in range(lanes)]
        for shard in shuffled:
            if counts[shard]:
                length, lane = heapq.heappop(lengths)
                self.shards[lane].append(shard)
                heapq.heappush(lengths, (length + counts[shard], lane))
        self.firsts = [[0, *accumulate(counts[shard] for shard in row)] for row in self.shards]
        # Round n takes a sample from each lane that is longer than n. No lane ends within a stretch of rounds.
        # `active`: the lanes of each stretch; `rounds` and `starts`: the round and the position at which it begins.
        ends = sorted({firsts[-1] for firsts in self.firsts})
        self.active = [[lane for lane in range(lanes) if self.firsts[lane][-1] >= end] for end in ends]
        self.rounds = [0, *ends[:-1]]
        stretches = zip(self.rounds, ends, self.active, strict=True)
        self.starts = [0, *accumulate((end - first) * len(active) for first, end, active in stretches)]

    def find(self, place: int, epoch: int) -> tuple[int, int, int, int]:
        stretch = bisect_right(self.starts, place) - 1
        round_, turn = divmod(place - self.starts[stretch], len(self.active[stretch]))
        lane, number = self.active[stretch][turn], self.rounds[stretch] + round_
        n = bisect_right(self.firsts[lane], number) - 1
        return lane, epoch, self.shards[lane][n], number - self.firsts[lane][n]


class PartTurns:
    """The turns of the parts of a mixture: `turns(number)` -> part and position in that part's order.

    Args:
        weights: of the parts, whole numbers of 1 or more.
        row: number of samples in one turn.

    Raises:
        UserError: the weights add up to more than `MOST_WEIGHT`.
    """

    def __init__(self, weights: Sequence[int], row: int, seed: int) -> None:
        self.weights, self.row, self.seed = list(weights), row, seed
        if sum(weights) > MOST_WEIGHT:
            raise UserError(f"weights add up to {sum(weights):,}; give at most {MOST_WEIGHT:,}, as in 3, 3 and 60")
        self._cycle = functools.lru_cache(maxsize=1)(self._draw_cycle)

    def __call__(self, number: int) -> tuple[int, int]:
        row, place = divmod(number, self.row)
        cycle, turn = divmod(row, sum(self.weights))
        part, before = self._cycle(cycle)[turn]
        return part, (cycle * self.weights[part] + before) * self.row + place

    def _draw_cycle(self, cycle: int) -> list[tuple[int, int]]:
        """For each turn of a cycle, the part and the number of turns that it had before in the cycle."""
        parts = [part for part, weight in enumerate(self.weights) for _ in range(weight)]
        had = [0] * len(self.weights)
        turns: list[tuple[int, int]] = []
        for n in torch.randperm(len(parts), generator=generator(self.seed, "turns", cycle)).tolist():
            turns.append((parts[n], had[parts[n]]))
            had[parts[n]] += 1
        return turns


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """The random generator for one purpose: always in the same state, and different for different purposes."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
