"""What all routes share: the batcher and its errors, names and limits."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from openblip2.errors import UserError
from openblip2.serve.batcher import Batcher, Full, Late
from openblip2.serve.guard import BUSY
from openblip2.serve.jobs import Failed, Job, Write
from openblip2.serve.limits import Limits
from openblip2.serve.metrics import Metrics
from openblip2.serve.worker import DIED, LATE


class Died(Exception):
    """The model's process ended over a request, or was ended."""


class Gone(Exception):
    """The client went away before it had its answer."""


async def _leaves(request: Request) -> None:
    """Ends when the client goes away; the request's body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def in_thread(call: Callable[..., Any], *given: Any) -> Any:
    """Something that may wait for a network or take long, beside the event loop."""
    return await asyncio.get_running_loop().run_in_executor(None, call, *given)


@dataclass
class Service:
    """A running server's parts. `writes`, `matches`, `searches`: what its models can do."""

    batcher: Batcher
    limits: Limits
    metrics: Metrics
    name: str
    writes: bool
    matches: bool
    searches: bool

    def require_writer(self) -> None:
        """A stage-2 run, or a `UserError`."""
        if not self.writes:
            raise UserError("this server has no stage-2 run, which writes text: start it with one")

    async def do(self, job: Job, request: Request) -> Any:
        """A job's result.

        Raises:
            UserError: what is wrong with the request. Full, Late: see `Batcher.do`. Died: the process ended over it.
            Gone: the client did not wait.
        """
        return (await self.do_all([job], request))[0]

    async def do_all(self, jobs: Sequence[Job], request: Request) -> list[Any]:
        """As `do`, of several; if one fails or the client goes away, the others are taken back."""
        tasks = [asyncio.create_task(self.batcher.do(job)) for job in jobs]
        every, left = asyncio.gather(*tasks), asyncio.create_task(_leaves(request))
        every.add_done_callback(lambda done: done.cancelled() or done.exception())  # looked at, whoever still waits
        try:
            await asyncio.wait((every, left), return_when=asyncio.FIRST_COMPLETED)
            if not every.done():
                raise Gone
            return [self.checked(result) for result in every.result()]
        finally:
            left.cancel()
            every.cancel()
            for task in tasks:
                task.cancel()

    async def stream(self, job: Write) -> AsyncIterator[Any]:
        """See `Batcher.stream`."""
        return await self.batcher.stream(job)

    def checked(self, result: Any) -> Any:
        """A result that is none as an error; see `do`."""
        if result in (DIED, LATE):
            raise Died(result.message)
        if isinstance(result, Failed):
            raise UserError(result.message)
        return result

    @staticmethod
    def status_of(error: Exception) -> int:
        """The HTTP status that an error becomes."""
        kinds = {UserError: 400, Full: 429, Late: 504, Died: 503, Gone: 499}
        return next((status for kind, status in kinds.items() if isinstance(error, kind)), 500)

    @staticmethod
    def said_of(error: Exception) -> str:
        """What a client is told of it."""
        if isinstance(error, Full):
            return BUSY
        if isinstance(error, Late):
            return "this took longer than the server allows"
        return str(error) if isinstance(error, UserError | Died) else "an error of the server's own; see its log"
