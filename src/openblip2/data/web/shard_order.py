"""In which order the samples of shards are seen: a function of the seed and of a sample's number, nothing else.

The shards of an epoch are shuffled and dealt to lanes (`data.open_shards` of them, or one for each shard where there
are fewer), the next one always to the shortest lane. A sample of each lane is taken in turn, and a lane goes through
its shards one after the other, each in a shuffled order of its own. So few shards are open at a time, neighbours in
the order come from different shards, and processes whose number divides that of the lanes share no shard.

A mixture takes its parts by turns, a row of samples (one of each lane) at a time: in every `sum(weights)` rows each
part has exactly its weight, in an order drawn anew. Each part's own order is endless, epoch after epoch.

So sample ten million is found without its predecessors, and a run may go on with another number of processes.
"""

import hashlib
import heapq
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from openblip2.errors import UserError

MOST_WEIGHT = 100_000  # of all parts together: a row of turns is drawn at once


class Spot(NamedTuple):
    """Where a sample lies: its lane and epoch, the shard of the part, the place in that shard's shuffled order."""

    lane: int
    epoch: int
    shard: int
    place: int


class Order:
    """The endless order of one part: `order(position)` -> `Spot`.

    Args:
        counts: samples of each shard; shards of 0 are passed over.
        lanes: shards that are read side by side.
        seed: of the shuffles.
        name: of the part, so that parts of a mixture are shuffled differently.

    Raises:
        UserError: there is no sample at all.
    """

    def __init__(self, counts: Sequence[int], lanes: int, seed: int, name: str = "") -> None:
        self.counts, self.seed, self.name, self.samples = counts, seed, name, sum(counts)
        if not self.samples:
            raise UserError(f"{name or 'the shards'}: hold no sample; shards with pictures and captions")
        self.lanes = min(lanes, sum(count > 0 for count in counts))
        self._epochs: dict[int, _Epoch] = {}

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

    def within(self, spot: Spot) -> list[int]:
        """The shuffled order of a spot's shard: the numbers of its samples, by place."""
        drawn = generator(self.seed, "shard", self.name, spot.epoch, spot.shard)
        return torch.randperm(self.counts[spot.shard], generator=drawn).tolist()

    def _epoch(self, number: int) -> "_Epoch":
        if number not in self._epochs:
            self._epochs = {n: epoch for n, epoch in self._epochs.items() if n == number - 1}  # what `after` looks at
            drawn = generator(self.seed, "epoch", self.name, number)
            self._epochs[number] = _Epoch(
                self.counts, torch.randperm(len(self.counts), generator=drawn).tolist(), self.lanes
            )
        return self._epochs[number]


class _Epoch:
    """One epoch's lanes, each a list of shards, and where each shard of a lane begins in it."""

    def __init__(self, counts: Sequence[int], shuffled: Sequence[int], lanes: int) -> None:
        self.shards: list[list[int]] = [[] for _ in range(lanes)]
        lengths = [(0, lane) for lane in range(lanes)]
        for shard in shuffled:
            if counts[shard]:
                length, lane = heapq.heappop(lengths)
                self.shards[lane].append(shard)
                heapq.heappush(lengths, (length + counts[shard], lane))
        self.firsts = [[0, *accumulate(counts[shard] for shard in row)] for row in self.shards]
        # In round n a sample is taken of each lane that has more than n; the lanes that end first drop out first.
        ends = sorted({firsts[-1] for firsts in self.firsts})
        self.active = [[lane for lane in range(lanes) if self.firsts[lane][-1] >= end] for end in ends]
        self.rounds = [0, *ends[:-1]]  # in which the lanes of `active` are taken from
        lengths_ = [
            (end - first) * len(active) for first, end, active in zip(self.rounds, ends, self.active, strict=True)
        ]
        self.starts = [0, *accumulate(lengths_)]

    def find(self, place: int, epoch: int) -> tuple[int, int, int, int]:
        stretch = bisect_right(self.starts, place) - 1
        round_, turn = divmod(place - self.starts[stretch], len(self.active[stretch]))
        lane, number = self.active[stretch][turn], self.rounds[stretch] + round_
        n = bisect_right(self.firsts[lane], number) - 1
        return lane, epoch, self.shards[lane][n], number - self.firsts[lane][n]


class Turns:
    """Whose turn it is in a mixture: `turns(number)` -> part and position in that part's order.

    Args:
        weights: of each part, whole numbers from 1 on.
        row: samples of one turn.
        seed: of the order of turns.

    Raises:
        UserError: the weights add up to more than `MOST_WEIGHT`.
    """

    def __init__(self, weights: Sequence[int], row: int, seed: int) -> None:
        self.weights, self.row, self.seed = list(weights), row, seed
        if sum(weights) > MOST_WEIGHT:
            raise UserError(f"weights add up to {sum(weights):,}; at most {MOST_WEIGHT:,}: 3, 3 and 60, say")
        self._drawn: tuple[int, list[tuple[int, int]]] = (-1, [])

    def __call__(self, number: int) -> tuple[int, int]:
        row, place = divmod(number, self.row)
        cycle, turn = divmod(row, sum(self.weights))
        if self._drawn[0] != cycle:
            self._drawn = cycle, self._draw(cycle)
        part, before = self._drawn[1][turn]
        return part, (cycle * self.weights[part] + before) * self.row + place

    def _draw(self, cycle: int) -> list[tuple[int, int]]:
        """Of each turn the part, and how many turns of the cycle it has had before."""
        parts = [part for part, weight in enumerate(self.weights) for _ in range(weight)]
        had = [0] * len(self.weights)
        turns: list[tuple[int, int]] = []
        for n in torch.randperm(len(parts), generator=generator(self.seed, "turns", cycle)).tolist():
            turns.append((parts[n], had[parts[n]]))
            had[parts[n]] += 1
        return turns


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """What is drawn for one purpose: the same whenever it is asked for, and for every purpose another."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
