"""The shards that are being read: each lane's present one, and the one behind it, opened before its turn comes.

A place of the order that holds no good sample (a broken picture, no caption, a shard that is cut off or gone) is given
to the next good one of the same shard, in its shuffled order, which is then seen twice in the epoch; where the shard
has none, to that of the same place in the lane's next shard. So batches are always full, they depend on nothing but
the seed and their number, and no process waits for another's disk. What is wrong is said once.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from openblip2.data.web.mixture import Part
from openblip2.data.web.shard_order import Order, Spot
from openblip2.data.web.tars import Shard
from openblip2.errors import UserError

THREADS = 4  # that open shards: they wait for disks and networks, and get in each other's way where they need not

Name = tuple[int, int]  # a part's number, and a shard's in it


class Opened(NamedTuple):
    """A shard, None where it cannot be opened, and the numbers of its samples that turned out bad."""

    shard: Shard | None
    bad: set[int]


class OpenShards:
    """The shards of some parts, opened as they are needed.

    Args:
        orders: of the parts.
        problem: is told what is wrong, each line once and one at a time, from any thread.
    """

    def __init__(self, parts: Sequence[Part], orders: Sequence[Order], problem: Callable[[str], object]) -> None:
        self.parts, self.orders = parts, orders
        self._tell, self._said, self._lock = problem, set[int](), threading.RLock()
        self._threads = ThreadPoolExecutor(THREADS, "shards")
        self._open: dict[Name, Future[Opened]] = {}
        self._within: dict[tuple[int, int, int], list[int]] = {}  # by part, epoch and shard

    def turn_to(self, spots: Sequence[tuple[int, Spot]]) -> None:
        """Opens the shards in which these spots of parts lie, and closes those that no lane is at any more.

        Called by one thread, while no other reads.
        """
        needed = {(part, spot.shard) for part, spot in spots}
        last = {(part, spot.lane): (part, spot) for part, spot in spots}
        following = {self._following(part, spot) for part, spot in last.values()}
        for opening in [self._start(name) for name in sorted(needed)]:
            opening.result()
        for name in sorted(following - needed):  # behind those that are waited for
            self._start(name)
        for name in self._open.keys() - needed - following:
            shard = self._open[name].result().shard
            if shard:  # a dead one stays known: it is not tried again
                shard.close()
                del self._open[name]
        wanted = {(part, spot.epoch, spot.shard) for part, spot in spots}
        self._within = {key: order for key, order in self._within.items() if key in wanted}

    def samples(self, part: int, spot: Spot) -> Iterator[tuple[Opened, Shard, int]]:
        """The sample of a spot and those that may stand in for it: shard and number. From any thread.

        Raises:
            UserError: the lane has no sample left to try.
        """
        order, held_out = self.orders[part], self.parts[part].held_out
        for _ in range(2 * len(order.counts)):
            opened = self._start((part, spot.shard)).result()
            numbers = self._numbers(part, spot)
            for n in range(len(numbers)):
                number = held_out[spot.shard] + numbers[(spot.place + n) % len(numbers)]
                if opened.shard and number < len(opened.shard) and number not in opened.bad:
                    yield opened, opened.shard, number
            epoch, shard = order.after(spot)
            spot = Spot(spot.lane, epoch, shard, spot.place % order.counts[shard])
        raise UserError(
            f"{self.parts[part].name}: not one good sample left to read; see skipped.jsonl for what is wrong"
        )

    def problem(self, line: str) -> None:
        with self._lock:
            if hash(line) not in self._said:
                self._said.add(hash(line))
                self._tell(line)

    def _following(self, part: int, spot: Spot) -> Name:
        """The shard that comes after a spot's in its lane and is not known to be dead."""
        for _ in self.parts[part].shards:
            epoch, shard = self.orders[part].after(spot)
            spot = spot._replace(epoch=epoch, shard=shard)
            known = self._open.get((part, shard))
            if known is None or not known.done() or known.result().shard:
                break
        return part, spot.shard

    def _numbers(self, part: int, spot: Spot) -> list[int]:
        with self._lock:
            key = part, spot.epoch, spot.shard
            if key not in self._within:
                self._within[key] = self.orders[part].within(spot)
            return self._within[key]

    def _start(self, name: Name) -> Future[Opened]:
        with self._lock:
            if name not in self._open:
                self._open[name] = self._threads.submit(self._opened, name)
            return self._open[name]

    def _opened(self, name: Name) -> Opened:
        part = self.parts[name[0]]
        url, count = part.shards[name[1]], part.counts[name[1]]
        try:
            shard = Shard(url, self.problem)
        except UserError as error:
            self.problem(f"{error}; its {count:,} samples are skipped")
            return Opened(None, set())
        if len(shard) != count:
            what = "the rest is skipped" if len(shard) < count else "what is more is left out"
            self.problem(f"{url}: holds {len(shard):,} samples, {count:,} were counted; {what}")
        return Opened(shard, set())
