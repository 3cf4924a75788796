"""Requests that come at the same time run together: a bounded queue before one worker.

A request waits for others that it may run with, `Limits.wait` at most, or as long as the worker is busy. Who goes away
is taken out; what runs for nobody is ended.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from openblip2.serve.jobs import Failed, Job, Write
from openblip2.serve.limits import Limits


class Runs(Protocol):
    """What runs batches: a `Worker`."""

    def run(self, jobs: list[Job]) -> list[Any]: ...

    def cancel(self) -> None: ...


class Full(Exception):
    """The queue is full, or too slow for another."""


class Late(Exception):
    """The time for a request is over."""


@dataclass(eq=False)
class Waiting:
    """A job and the client who waits for its result."""

    job: Job
    result: "asyncio.Future[Any]"
    pieces: "asyncio.Queue[str | None]" = field(default_factory=asyncio.Queue)


class Batcher:
    """Made and used in one event loop.

    Attributes:
        waiting: jobs that no batch has taken yet. running: those of the batch that runs.

    Args:
        told: is called with the size of each batch.
    """

    def __init__(self, worker: Runs, limits: Limits, told: Callable[[int], object] = lambda size: None) -> None:
        self.worker, self.limits, self.told = worker, limits, told
        self.waiting: list[Waiting] = []
        self.running: list[Waiting] = []
        self._pace = 0.0  # seconds of a job lately
        self._streams: dict[int, Waiting] = {}
        self._numbers = itertools.count(1)
        self._thread = ThreadPoolExecutor(1, "batches")
        self._some = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._serve())

    @property
    def full(self) -> bool:
        """Whether a further job would be told `Full`: too many wait, or it could not be done in time."""
        before = len(self.waiting) + len(self.running)
        return before >= self.limits.queue or before * self._pace > self.limits.seconds

    @property
    def patience(self) -> int:
        """Seconds until half of a full queue will be done, by what jobs took lately: when to ask again."""
        return max(1, round(min(self._pace * self.limits.queue / 2, self.limits.seconds)))

    async def do(self, job: Job) -> Any:
        """A job's result.

        Raises:
            Full: too many wait. Late: it took longer than `Limits.seconds`.
        """
        mine = self._enter(job)
        try:
            async with asyncio.timeout(self.limits.seconds):
                return await mine.result
        except TimeoutError as error:
            raise Late from error
        finally:
            self._leave(mine)

    async def stream(self, job: Write) -> AsyncIterator[Any]:
        """Pieces of the text as they are written, and last the result.

        Raises:
            Full, Late: as `do`, the first before anything is given.
        """
        number = next(self._numbers)
        mine = self._enter(Write(**{**vars(job), "stream": number}))
        self._streams[number] = mine
        return self._pieces(mine, number)

    async def _pieces(self, mine: Waiting, number: int) -> AsyncIterator[Any]:
        # The pieces end with None, which the process sends; where it failed, nothing may come from it any more.
        mine.result.add_done_callback(lambda done: _failed(done) and mine.pieces.put_nowait(None))
        try:
            async with asyncio.timeout(self.limits.seconds):
                while (piece := await mine.pieces.get()) is not None:
                    yield piece
                yield await mine.result
        except TimeoutError as error:
            raise Late from error
        finally:
            del self._streams[number]
            self._leave(mine)

    def said(self, number: int, text: str | None) -> None:
        """A piece of what is being written, None at its end; from any thread."""

        def give() -> None:
            if mine := self._streams.get(number):
                mine.pieces.put_nowait(text)

        self._loop.call_soon_threadsafe(give)

    async def close(self) -> None:
        self._task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _enter(self, job: Job) -> Waiting:
        if self.full:
            raise Full
        mine = Waiting(job, self._loop.create_future())
        self.waiting.append(mine)
        self._some.set()
        return mine

    def _leave(self, mine: Waiting) -> None:
        mine.result.cancel()
        if mine in self.waiting:
            self.waiting.remove(mine)
        elif self.running and all(one.result.cancelled() for one in self.running):
            self.worker.cancel()

    async def _serve(self) -> None:
        while True:
            await self._some.wait()
            await asyncio.sleep(self.limits.wait)
            self._some.clear()
            while batch := self._take():
                self.running = batch
                self.told(len(batch))
                jobs = [one.job for one in batch]
                began = self._loop.time()
                try:
                    results = await self._loop.run_in_executor(self._thread, self.worker.run, jobs)
                except Exception as error:  # whatever it is, these clients learn of it and the others are served
                    results = [error] * len(batch)
                self.running = []
                took = (self._loop.time() - began) / len(batch)
                self._pace = took if not self._pace else 0.7 * self._pace + 0.3 * took
                for one, result in zip(batch, results, strict=True):
                    if one.result.done():
                        continue
                    if isinstance(result, Exception):
                        one.result.set_exception(result)
                    else:
                        one.result.set_result(result)

    def _take(self) -> list[Waiting]:
        """The first that waits, and those behind it that run with it."""
        if not self.waiting:
            return []
        kind = self.waiting[0].job.together
        batch = [one for one in self.waiting if one.job.together == kind][: self.limits.batch]
        self.waiting = [one for one in self.waiting if one not in batch]
        return batch


def _failed(done: "asyncio.Future[Any]") -> bool:
    return done.cancelled() or done.exception() is not None or isinstance(done.result(), Failed)
