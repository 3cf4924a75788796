"""Runs requests in batches: a bounded queue for one worker.

A job waits for others that can share its batch, for `Limits.wait` seconds or as long as the worker is busy. Jobs of
disconnected clients are removed from the queue, and a batch is stopped when all of its clients have disconnected.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from openblip2.apps.serve.engine import Job, Write
from openblip2.apps.serve.http import ServeError
from openblip2.apps.serve.worker import Worker


@dataclass(frozen=True)
class Limits:
    """Limits of one server.

    Attributes:
        bytes: maximum size of a request's body.
        queue: maximum number of requests that wait or run; further requests get status 429.
        batch: maximum number of requests in one batch.
        wait: seconds to wait for more requests before a batch starts.
        seconds: time limit for one request; when it has passed, the request gets status 504.
    """

    bytes: int = 16 * 2**20
    queue: int = 64
    batch: int = 16
    wait: float = 0.01
    seconds: float = 60.0


@dataclass(eq=False)
class Waiting:
    """A job whose client waits. `events` gets the text so far of a stream, then the result or an exception."""

    job: Job
    events: "asyncio.Queue[tuple[str, Any]]" = field(default_factory=asyncio.Queue)


class Batcher:
    """Collects jobs into batches. It must be created and used in the same event loop.

    Args:
        worker: runs the batches.
        limits: limits of the queue, the batches and the time.

    Attributes:
        waiting: jobs that are in no batch yet.
        running: jobs of the running batch, without those of disconnected clients.
    """

    def __init__(self, worker: Worker, limits: Limits) -> None:
        self.worker, self.limits = worker, limits
        self.waiting: list[Waiting] = []
        self.running: list[Waiting] = []
        self.seconds_per_job = 0.0  # moving average
        self._thread = ThreadPoolExecutor(1)
        self._arrived = asyncio.Event()
        self._task = asyncio.create_task(self._run_batches())

    def check_room(self) -> None:
        """Raises a `ServeError` if too many jobs wait, or if one more could not be done in time."""
        jobs, limits = len(self.waiting) + len(self.running), self.limits
        if jobs >= limits.queue or jobs * self.seconds_per_job > limits.seconds:
            # Half of a full queue will be done in this time.
            seconds = max(1, round(min(self.seconds_per_job * limits.queue / 2, limits.seconds)))
            headers = {"Retry-After": str(seconds)}
            raise ServeError("the server is busy: try again later", 429, "rate_limit_exceeded", headers=headers)

    async def answers(self, request: Request, jobs: Sequence[Job]) -> list[Any]:
        """The results of a request's jobs, cancelled if the client disconnects. The body must already be read."""
        work, disconnect = asyncio.gather(*map(self.do, jobs)), asyncio.create_task(_disconnect(request))
        try:
            await asyncio.wait((work, disconnect), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ServeError("the client disconnected", 499)
            return work.result()
        finally:
            work.cancel()
            disconnect.cancel()

    async def do(self, job: Job) -> Any:
        """The result of a job; see `stream`."""
        return [event async for event in self.stream(job)][-1]

    def stream(self, job: Job) -> AsyncIterator[Any]:
        """Yields the text so far while it is generated, then the result.

        Raises:
            ServeError: the queue is full (raised at once), or the job took too long.
            UserError: the request is wrong.
        """
        self.check_room()
        waiting = Waiting(job)
        self.waiting.append(waiting)
        self._arrived.set()
        return self._events(waiting)

    async def _events(self, waiting: Waiting) -> AsyncIterator[Any]:
        deadline, kind = asyncio.get_running_loop().time() + self.limits.seconds, "text"
        try:
            while kind == "text":
                async with asyncio.timeout_at(deadline):
                    kind, value = await waiting.events.get()
                if isinstance(value, Exception):
                    raise value
                yield value
        except TimeoutError as error:
            raise ServeError("the request took longer than the server allows", 504) from error
        finally:
            if waiting in self.waiting:
                self.waiting.remove(waiting)
            elif waiting in self.running:
                self.running.remove(waiting)
                if not self.running:
                    self.worker.cancel()

    def close(self) -> None:
        """Ends the worker and the running batch."""
        self._task.cancel()
        self.worker.close()
        self._thread.shutdown(wait=False)

    async def _run_batches(self) -> None:
        while True:
            await self._arrived.wait()
            await asyncio.sleep(self.limits.wait)
            self._arrived.clear()
            while self.waiting:
                await self._run_batch()

    async def _run_batch(self) -> None:
        """Runs the first waiting job together with later ones that can share its batch."""
        first, loop = self.waiting[0], asyncio.get_running_loop()
        batch = [one for one in self.waiting if one is first or _can_share(one.job, first.job)][: self.limits.batch]
        self.waiting = [one for one in self.waiting if one not in batch]
        self.running = list(batch)

        def send_text(text: str) -> None:  # in the worker's thread; a streamed job runs alone
            loop.call_soon_threadsafe(first.events.put_nowait, ("text", text))

        start = loop.time()
        try:
            jobs = [one.job for one in batch]
            results = await loop.run_in_executor(self._thread, self.worker.run, jobs, send_text)
        except Exception as error:  # the clients of this batch get it; later batches still run
            results = [error] * len(batch)
        self.running = []
        seconds = (loop.time() - start) / len(batch)
        self.seconds_per_job = 0.7 * (self.seconds_per_job or seconds) + 0.3 * seconds
        for one, result in zip(batch, results, strict=True):
            one.events.put_nowait(("result", result))


def _can_share(one: Job, other: Job) -> bool:
    if isinstance(one, Write) and isinstance(other, Write):
        return one.decoding == other.decoding and not (one.stream or other.stream)
    return type(one) is type(other)


async def _disconnect(request: Request) -> None:
    """Returns when the client disconnects."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
