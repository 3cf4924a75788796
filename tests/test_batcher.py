"""Requests that arrive together run in one batch; tested with a worker that only records its jobs."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
from starlette.requests import Request

from openblip2.apps.serve.batcher import Batcher, Limits, Worker
from openblip2.apps.serve.engine import Engine, Job, Reply, Write
from openblip2.apps.serve.http import ServeError
from openblip2.errors import UserError
from openblip2.model.decoding import Decoding


class Recorder(Worker):
    """Answers each job with its text; waits for `go` before each batch."""

    def __init__(self) -> None:
        self.batches: list[list[Job]] = []
        self.go = threading.Event()
        self.go.set()
        self.cancelled = 0
        self.does: Callable[[list[Job]], list[Any]] = texts_of

    def run(self, jobs: Sequence[Job], on_text: Callable[[str], object] = print) -> list[Any]:
        self.batches.append(list(jobs))
        self.on_text = on_text
        assert self.go.wait(10)
        return self.does(list(jobs))

    def cancel(self) -> None:
        self.cancelled += 1
        self.go.set()

    def close(self) -> None:
        self.go.set()


def embed(text: str) -> Job:
    return partial(Engine.embed, inputs=[text])


def texts_of(jobs: list[Job]) -> list[Any]:
    return [None if isinstance(job, Write) else job.keywords["inputs"][0] for job in jobs]


async def until(true: Callable[[], bool]) -> None:
    for _ in range(1000):
        if true():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came true")


async def in_turn(batcher: Batcher, worker: Recorder, jobs: list[Job]) -> list[Any]:
    """Runs a first job, and sends all other jobs while it runs. Returns the results."""
    worker.go.clear()
    first = asyncio.create_task(batcher.do(embed("first")))
    await until(lambda: bool(worker.batches))
    others = [asyncio.create_task(batcher.do(job)) for job in jobs]
    await until(lambda: len(batcher.waiting) == len(jobs))
    worker.go.set()
    return [await task for task in (first, *others)]


def test_what_waits_runs_together() -> None:
    async def body() -> None:
        worker = Recorder()
        batcher = Batcher(worker, Limits(batch=4, wait=0))
        found = await in_turn(batcher, worker, [embed(str(n)) for n in range(6)])
        assert found == ["first", *map(str, range(6))]
        assert [len(batch) for batch in worker.batches] == [1, 4, 2]
        batcher.close()

    asyncio.run(body())


def test_only_what_fits_runs_together() -> None:
    async def body() -> None:
        worker = Recorder()
        worker.does = lambda jobs: [0] * len(jobs)
        batcher = Batcher(worker, Limits(wait=0))
        greedy, beams = Decoding(beams=1), Decoding(beams=3)
        jobs: list[Job] = [Write(b"a", greedy), Write(b"b", beams), Write(b"c", greedy), embed("x")]
        await in_turn(batcher, worker, jobs)
        assert worker.batches[1:] == [[jobs[0], jobs[2]], [jobs[1]], [jobs[3]]]
        batcher.close()

    asyncio.run(body())


def busy(batcher: Batcher) -> str | None:
    """The seconds after which a refused client may try again; None = the server is not busy."""
    try:
        batcher.check_room()
    except ServeError as error:
        return dict(error.headers or {})["Retry-After"]
    return None


def test_a_full_queue_says_so_and_empties_again() -> None:
    async def body() -> None:
        worker = Recorder()
        worker.go.clear()
        batcher = Batcher(worker, Limits(queue=3, wait=0))
        tasks = [asyncio.create_task(batcher.do(embed(str(n)))) for n in range(3)]
        await until(lambda: bool(worker.batches))
        assert busy(batcher) == "1"
        with pytest.raises(ServeError, match="429: the server is busy"):
            await batcher.do(embed("one too many"))
        worker.go.set()
        assert [await task for task in tasks] == ["0", "1", "2"]
        assert busy(batcher) is None
        assert await batcher.do(embed("later")) == "later"
        batcher.close()

    asyncio.run(body())


@pytest.mark.parametrize(("seconds", "retry"), [(0.05, "10"), (0.6, "30")])
def test_when_to_ask_again_is_what_half_the_queue_takes(seconds: float, retry: str) -> None:
    async def body() -> None:
        worker = Recorder()
        batcher = Batcher(worker, Limits(queue=400, wait=0, seconds=30))
        worker.go.clear()
        tasks = [asyncio.create_task(batcher.do(embed(str(n)))) for n in range(400)]
        await until(lambda: bool(worker.batches))
        batcher.seconds_per_job = seconds
        assert busy(batcher) == retry
        for task in tasks:
            task.cancel()
        batcher.close()

    asyncio.run(body())


def test_who_could_not_be_served_in_time_is_told_at_once() -> None:
    async def body() -> None:
        worker = Recorder()
        batcher = Batcher(worker, Limits(queue=400, batch=1, wait=0, seconds=1))
        worker.does = lambda jobs: time.sleep(0.4) or ["done"]
        tasks = [asyncio.create_task(batcher.do(embed("one")))]
        await tasks[0]
        assert batcher.seconds_per_job >= 0.4
        tasks += [asyncio.create_task(batcher.do(embed("one"))) for _ in range(3)]
        await asyncio.sleep(0.01)
        with pytest.raises(ServeError, match="429: the server is busy"):  # three jobs of at least 0.4 s are before it
            await batcher.do(embed("one too many"))
        for task in tasks:
            task.cancel()
        batcher.close()

    asyncio.run(body())


def test_who_goes_away_is_taken_out() -> None:
    async def body() -> None:
        worker = Recorder()
        worker.go.clear()
        batcher = Batcher(worker, Limits(wait=0))
        first = asyncio.create_task(batcher.do(embed("first")))
        await until(lambda: bool(worker.batches))
        second = asyncio.create_task(batcher.do(embed("second")))
        await until(lambda: len(batcher.waiting) == 1)
        second.cancel()
        await until(lambda: not batcher.waiting)
        assert worker.cancelled == 0
        first.cancel()  # no client waits for the running batch now
        await until(lambda: worker.cancelled == 1)
        assert len(worker.batches) == 1
        assert await batcher.do(embed("third")) == "third"
        batcher.close()

    asyncio.run(body())


def test_the_batch_of_a_client_that_disconnects_is_stopped() -> None:
    async def body() -> None:
        worker = Recorder()
        worker.go.clear()
        batcher = Batcher(worker, Limits(wait=0))

        async def receive() -> dict[str, Any]:
            await until(lambda: bool(worker.batches))
            return {"type": "http.disconnect"}

        with pytest.raises(ServeError, match="499: the client disconnected"):
            await batcher.answers(Request({"type": "http"}, receive), [embed("a")])
        await until(lambda: worker.cancelled == 1)
        batcher.close()

    asyncio.run(body())


def test_a_batch_goes_on_while_anybody_waits() -> None:
    async def body() -> None:
        worker = Recorder()
        batcher = Batcher(worker, Limits(wait=0.05))
        worker.go.clear()
        tasks = [asyncio.create_task(batcher.do(embed(str(n)))) for n in range(2)]
        await until(lambda: len(batcher.running) == 2)
        tasks[0].cancel()
        await asyncio.sleep(0.02)
        assert worker.cancelled == 0
        worker.go.set()
        assert await tasks[1] == "1"
        batcher.close()

    asyncio.run(body())


def test_what_takes_too_long_is_late() -> None:
    async def body() -> None:
        worker = Recorder()
        worker.go.clear()
        batcher = Batcher(worker, Limits(seconds=0.05, wait=0))
        with pytest.raises(ServeError, match="504: the request took longer"):
            await batcher.do(embed("a"))
        assert worker.cancelled == 1
        batcher.close()

    asyncio.run(body())


def test_an_error_is_the_batchs_alone() -> None:
    async def body() -> None:
        worker = Recorder()
        batcher = Batcher(worker, Limits(wait=0))

        def breaks(jobs: list[Job]) -> list[Any]:
            raise RuntimeError("broken")

        right, worker.does = worker.does, breaks
        with pytest.raises(RuntimeError, match="broken"):
            await batcher.do(embed("a"))
        worker.does = right
        assert await batcher.do(embed("b")) == "b"
        batcher.close()

    asyncio.run(body())


@pytest.mark.parametrize("end", [Reply("a cat", 3, 2), UserError("no")])
def test_pieces_come_before_the_result(end: Any) -> None:
    async def body() -> None:
        worker = Recorder()
        batcher = Batcher(worker, Limits(wait=0))

        def says(jobs: list[Job]) -> list[Any]:
            for piece in ("a ", "cat"):
                worker.on_text(piece)
            return [end]

        worker.does = says
        found: list[Any] = []
        try:
            async for piece in batcher.stream(Write(b"x", Decoding(), stream=True)):
                found.append(piece)
        except UserError as error:
            found.append(error)
        assert found == ["a ", "cat", end]
        batcher.close()

    asyncio.run(body())


def test_a_stream_runs_alone() -> None:
    async def body() -> None:
        worker = Recorder()
        worker.does = lambda jobs: [0] * len(jobs)
        batcher = Batcher(worker, Limits(wait=0.01))
        streams = [batcher.stream(Write(b"x", Decoding(), stream=True)) for _ in range(2)]
        for stream in streams:
            assert [piece async for piece in stream] == [0]
        assert [len(batch) for batch in worker.batches] == [1, 1]
        batcher.close()

    asyncio.run(body())
