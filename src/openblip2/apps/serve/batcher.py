"""Run requests in batches: a bounded queue in front of one worker.

A job waits for others that can share its batch, for `Limits.wait` seconds or as long as the worker is busy. Jobs of
disconnected clients leave the queue, and a batch is stopped when all of its clients have disconnected.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.requests import Request

from openblip2.apps.serve.errors import ServeError
from openblip2.apps.serve.jobs import Job, Write


@dataclass(frozen=True)
class Limits:
    """What one server allows.

    Attributes:
        bytes: size of a request's body.
        queue: requests that wait or run; others get status 429.
        batch: requests in one batch.
        wait: seconds to wait for others to fill a batch.
        seconds: time for one request; after it the status is 504.
        tokens: new tokens of one answer.
        texts: texts of one request, to match or to embed.
        remote: whether pictures are fetched from http(s) addresses.
    """

    bytes: int = 16 * 2**20
    queue: int = 64
    batch: int = 16
    wait: float = 0.01
    seconds: float = 60.0
    tokens: int = 256
    texts: int = 64
    remote: bool = False


class Runner(Protocol):
    """What runs the batches: a `Worker`."""

    def run(self, jobs: list[Job], on_text: Callable[[str], object]) -> list[Any]: ...

    def cancel(self) -> None: ...


class Full(ServeError):
    """The queue is full, or too slow for one more request."""

    def __init__(self, retry_after: int) -> None:
        headers = {"Retry-After": str(retry_after)}
        super().__init__("the server is busy: try again later", 429, "rate_limit_exceeded", headers=headers)


class Late(ServeError):
    """A request took longer than `Limits.seconds`."""

    def __init__(self) -> None:
        super().__init__("the request took longer than the server allows", 504)


@dataclass(eq=False)
class Waiting:
    """A job whose client waits; `pieces` of a streamed text end with None."""

    job: Job
    result: "asyncio.Future[Any]"
    pieces: "asyncio.Queue[str | None]" = field(default_factory=asyncio.Queue)


class Batcher:
    """Made and used in one event loop.

    Args:
        worker: runs the batches.
        limits: of queue, batch and time.
        on_batch: called with the size of each batch.

    Attributes:
        waiting: jobs that are in no batch yet.
        running: jobs of the batch that runs.
    """

    def __init__(self, worker: Runner, limits: Limits, on_batch: Callable[[int], object] = lambda size: None) -> None:
        self.worker, self.limits, self.on_batch = worker, limits, on_batch
        self.waiting: list[Waiting] = []
        self.running: list[Waiting] = []
        self._seconds_per_job = 0.0  # moving average
        self._thread = ThreadPoolExecutor(1, "batches")
        self._arrived = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._run_batches())

    @property
    def full(self) -> bool:
        """Whether one more job would be refused: too many wait, or it could not be done in time."""
        ahead = len(self.waiting) + len(self.running)
        return ahead >= self.limits.queue or ahead * self._seconds_per_job > self.limits.seconds

    @property
    def retry_after(self) -> int:
        """Seconds in which half of a full queue will be done, from the time that recent jobs took."""
        return max(1, round(min(self._seconds_per_job * self.limits.queue / 2, self.limits.seconds)))

    async def do(self, job: Job) -> Any:
        """The job's result.

        Raises:
            Full: the queue is full.
            Late: the job took too long.
            UserError: the request is wrong.
        """
        waiting = self._enter(job)
        try:
            async with asyncio.timeout(self.limits.seconds):
                return await waiting.result
        except TimeoutError as error:
            raise Late from error
        finally:
            self._leave(waiting)

    async def answer(self, request: Request, *jobs: Job) -> list[Any]:
        """The results of a request's jobs; see `do`. All are cancelled if one fails or the client disconnects."""
        tasks = [asyncio.create_task(self.do(job)) for job in jobs]
        results, disconnect = asyncio.gather(*tasks), asyncio.create_task(_disconnect(request))
        results.add_done_callback(lambda done: done.cancelled() or done.exception())  # so that asyncio logs nothing
        try:
            await asyncio.wait((results, disconnect), return_when=asyncio.FIRST_COMPLETED)
            if not results.done():
                raise ServeError("the client disconnected", 499)
            return results.result()
        finally:
            for task in (disconnect, results, *tasks):
                task.cancel()

    def stream(self, job: Write) -> AsyncIterator[Any]:
        """Pieces of the text while it is written, then the result. Raises as `do` does, `Full` immediately."""
        return self._stream(self._enter(job))

    async def _stream(self, waiting: Waiting) -> AsyncIterator[Any]:
        try:
            async with asyncio.timeout(self.limits.seconds):
                while (piece := await waiting.pieces.get()) is not None:
                    yield piece
                yield await waiting.result
        except TimeoutError as error:
            raise Late from error
        finally:
            self._leave(waiting)

    async def close(self) -> None:
        """Stops taking jobs."""
        self._task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _enter(self, job: Job) -> Waiting:
        if self.full:
            raise Full(self.retry_after)
        waiting = Waiting(job, self._loop.create_future())
        self.waiting.append(waiting)
        self._arrived.set()
        return waiting

    def _leave(self, waiting: Waiting) -> None:
        waiting.result.cancel()
        if waiting in self.waiting:
            self.waiting.remove(waiting)
        elif self.running and all(one.result.cancelled() for one in self.running):
            self.worker.cancel()

    async def _run_batches(self) -> None:
        while True:
            await self._arrived.wait()
            await asyncio.sleep(self.limits.wait)
            self._arrived.clear()
            while self.waiting:
                self.running = batch = self._take()
                self.on_batch(len(batch))
                start = self._loop.time()
                try:
                    jobs = [one.job for one in batch]
                    results = await self._loop.run_in_executor(self._thread, self.worker.run, jobs, self._send_text)
                except Exception as error:  # these clients get it, and the others are served
                    results = [error] * len(batch)
                self.running = []
                seconds = (self._loop.time() - start) / len(batch)
                average = self._seconds_per_job
                self._seconds_per_job = 0.7 * average + 0.3 * seconds if average else seconds
                for one, result in zip(batch, results, strict=True):
                    if not one.result.done():
                        (one.result.set_exception if isinstance(result, Exception) else one.result.set_result)(result)
                        one.pieces.put_nowait(None)

    def _send_text(self, text: str) -> None:
        # Called in the worker's thread. A streamed job runs alone, so the text is the first job's.
        self._loop.call_soon_threadsafe(lambda: [one.pieces.put_nowait(text) for one in self.running])

    def _take(self) -> list[Waiting]:
        """Takes the first job that waits, and later ones that can share its batch."""
        first, kind = self.waiting[0], _kind(self.waiting[0].job)
        batch = [one for one in self.waiting if one is first or (_kind(one.job) == kind and kind[2] is False)]
        batch = batch[: self.limits.batch]
        self.waiting = [one for one in self.waiting if one not in batch]
        return batch


def _kind(job: Job) -> tuple[type, Any, bool]:
    return type(job), getattr(job, "decoding", None), getattr(job, "stream", False)


async def _disconnect(request: Request) -> None:
    """Returns when the client disconnects. The request's body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
