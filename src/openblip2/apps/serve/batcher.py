"""Runs requests in batches: a process with the models, and a bounded queue for it.

A job waits for others that can share its batch, for `Limits.wait` seconds or as long as the process is busy. Jobs of
disconnected clients are removed from the queue, and a batch is stopped when all of its clients have disconnected.
"""

import asyncio
import multiprocessing
import signal
import sys
import time
import traceback
import warnings
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from openblip2.apps.serve.engine import Engine, Job, Served, Write
from openblip2.apps.serve.http import ServeError
from openblip2.errors import UserError


class Worker:
    """A process that runs batches. Only one thread at a time may call `run`.

    Args:
        served: the models and the index that the process loads.
        seconds: time limit for one batch; when it has passed, the process is killed.

    Raises:
        UserError: the models cannot be loaded.
    """

    def __init__(self, served: Served, seconds: float) -> None:
        self.served, self.seconds = served, seconds
        self._closed = False
        self._start()

    def run(self, jobs: Sequence[Job], on_text: Callable[[str], object] = lambda text: None) -> list[Any]:
        """Returns the results in the order of the jobs. The result of a failed job is an exception.

        If the process dies, each job of the batch is tried again alone, so that only the job that kills it fails.
        `on_text` is called with the part of a streamed text that is generated so far.
        """
        try:
            self._stop.value = 0
            self._pipe.send(list(jobs))
            deadline = time.monotonic() + self.seconds
            while self._pipe.poll(max(0.0, deadline - time.monotonic())):
                message = self._pipe.recv()
                if isinstance(message, list):
                    return message
                on_text(message)
            self._restart()
            return [ServeError("the request took longer than the server allows", 503)] * len(jobs)
        except (EOFError, OSError):  # the process died
            self._restart()
            if len(jobs) == 1:
                return [ServeError("the process with the models crashed during this request", 503)]
            return [self.run([job], on_text)[0] for job in jobs]

    def cancel(self) -> None:
        """Stops the running batch after the current token."""
        self._stop.value = 1

    def close(self) -> None:
        """Ends the process and does not start it again."""
        self._closed = True
        self._kill()

    def _kill(self) -> None:
        self._process.kill()
        self._process.join()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child_pipe = context.Pipe()
        self._stop: Any = context.Value("b", 0, lock=False)  # no lock, because a killed process may not release it
        args = (self.served, child_pipe, self._stop)
        self._process = context.Process(target=_answer_batches, args=args, daemon=True)
        self._process.start()
        child_pipe.close()  # otherwise `recv` does not raise EOFError when the process ends
        try:
            problem = self._pipe.recv()
        except EOFError:
            problem = "the process with the models ended while loading them: is there enough memory?"
        if problem is not None:
            self._kill()
            raise UserError(problem)

    def _restart(self) -> None:
        if self._closed:
            raise ServeError("the server is stopping", 503)
        self._kill()
        print("openblip2: the process with the models is started again", file=sys.stderr, flush=True)
        try:
            self._start()
        except UserError as error:  # not the client's fault; the next batch tries to start it again
            raise ServeError(f"the models cannot be loaded again: {error}", 503) from error


def _answer_batches(served: Served, pipe: Any, stop: Any) -> None:
    """Runs in the worker process: loads the models, sends None or an error message, then answers each batch.

    For each batch, it sends the text so far if the text is streamed, and then the list of results.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes; the server ends this one
    warnings.filterwarnings("ignore", category=FutureWarning)  # as in `cli.main`
    try:
        engine = Engine(served, send_text=pipe.send, stopped=lambda: bool(stop.value))
    except UserError as error:
        pipe.send(str(error))
        return
    pipe.send(None)
    while True:
        try:
            jobs = pipe.recv()
        except EOFError:  # the server has ended
            return
        try:
            pipe.send(engine.run(jobs))
        except Exception:  # the server logs it and answers 500
            problem = RuntimeError(f"in the process with the models:\n{traceback.format_exc()}")
            pipe.send([problem] * len(jobs))


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
    """Collects jobs into batches for the worker. It must be created and used in the same event loop.

    Attributes:
        waiting: jobs that are in no batch yet.
        running: jobs of the running batch, without those of disconnected clients.
    """

    def __init__(self, worker: Worker, limits: Limits) -> None:
        self.worker, self.limits = worker, limits
        self.waiting: list[Waiting] = []
        self.running: list[Waiting] = []
        self.seconds_per_job = 0.0  # moving average
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
            results = await asyncio.to_thread(self.worker.run, jobs, send_text)
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
