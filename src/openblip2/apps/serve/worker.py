"""The process that holds the models: how it is started, stopped and restarted."""

import multiprocessing
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from openblip2.apps.serve.engine import Engine, Job, Served
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

        Args:
            jobs: one batch.
            on_text: called with the part of a streamed text that is generated so far.
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
