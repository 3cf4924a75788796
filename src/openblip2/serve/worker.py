"""The process with the models, seen from the server: batches are run in it, and it is started anew when it dies."""

import multiprocessing
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from openblip2.errors import UserError
from openblip2.serve import engine
from openblip2.serve.jobs import Failed, Job

DIED = Failed("the model's process ended while it worked on this")
LATE = Failed("this took longer than the server allows")


class Worker:
    """One process; its calls come from one thread at a time.

    Args:
        given: captioner, matcher, index, as `engine.start` takes them. threads: of torch there.
        seconds: that a batch may take before the process is ended. say: is told a piece of what is being written.
        restarted: is called when the process had to be started anew.
    """

    def __init__(
        self,
        given: tuple[str | None, str | None, str | None],
        threads: int,
        seconds: float,
        say: Callable[[int, str | None], object],
        restarted: Callable[[], object],
    ) -> None:
        self.given, self.threads, self.seconds, self.say, self.restarted = given, threads, seconds, say, restarted
        self._start()

    def run(self, jobs: Sequence[Job]) -> list[Any]:
        """Results in the jobs' order.

        Where the process dies, each job of the batch is tried once more, alone: the one that it dies of is `DIED`,
        the others are done.
        """
        try:
            return self._pool.submit(engine.run, list(jobs)).result(self.seconds)
        except BrokenProcessPool:
            self._restart()
            return [DIED] if len(jobs) == 1 else [self.run([job])[0] for job in jobs]
        except TimeoutError:
            self._restart()
            return [LATE] * len(jobs)

    def cancel(self) -> None:
        """Nobody waits any more for what is being written: it ends with the next word."""
        self._stop.set()

    def close(self) -> None:
        self._end()

    def _start(self) -> None:
        """Loads the models in a new process and waits for it.

        Raises:
            UserError: they cannot be loaded.
        """
        context = multiprocessing.get_context("spawn")
        # A queue of its own for each process: one that died may have left half a message in it.
        self._pieces, self._stop = context.SimpleQueue(), context.Event()
        given = (*self.given, self._pieces, self._stop, self.threads)
        self._pool = ProcessPoolExecutor(1, context, _begin, given)
        threading.Thread(target=_tell, args=(self._pieces, self.say), daemon=True).start()
        try:
            problem = self._pool.submit(_begun).result()
        except BrokenProcessPool as error:
            raise UserError(
                "the process with the models ended while it loaded them: is there memory enough?"
            ) from error
        if problem is not None:
            self._end()
            raise UserError(problem)

    def _restart(self) -> None:
        self._end()
        self.restarted()
        self._start()

    def _end(self) -> None:
        for process in list((self._pool._processes or {}).values()):
            process.kill()
        self._pool.shutdown(cancel_futures=True)
        self._pieces.put(None)


_problem: str | None = None


def _begin(*given: Any) -> None:
    """An initializer that raises would only be a broken pool: the reason is kept to be asked for."""
    global _problem
    try:
        engine.start(*given)
    except UserError as error:
        _problem = str(error)


def _begun() -> str | None:
    return _problem


def _tell(pieces: Any, say: Callable[[int, str | None], object]) -> None:
    while True:
        try:
            piece = pieces.get()
        except (EOFError, OSError):
            return
        if piece is None:
            return
        say(*piece)
