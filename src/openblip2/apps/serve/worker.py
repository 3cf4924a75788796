"""The process that holds the models: what it is asked to do, and how it is started, stopped and restarted."""

import multiprocessing
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from prometheus_client import Counter

from openblip2.apps.serve.http import ServeError
from openblip2.errors import UserError
from openblip2.model.decoding import Decoding
from openblip2.model.likelihood import TokenScore

RESTARTS = Counter("openblip2_worker_restarts", "Restarts of the models' process.")


@dataclass(frozen=True)
class Served:
    """What a server serves, each None where there is none: folders of a stage-2 run, a stage-1 run and an index."""

    captioner: str | None = None
    matcher: str | None = None
    index: str | None = None


@dataclass(frozen=True)
class Write:
    """Write a text about a picture; the result is a `Written`.

    Attributes:
        picture: content of a picture file.
        decoding: jobs with equal settings can share a batch.
        question: None = a caption.
        turns: earlier questions and their answers.
        prompt: how a caption begins; None = the run's own prompt.
        plain: whether the question is asked as in VQA (`Captioner.answer`), else as it is written.
        stream: whether the text is sent while it is written; such a job runs alone.
        logprobs: number of most likely tokens to list at each position; None = no log-probabilities.
    """

    picture: bytes
    decoding: Decoding
    question: str | None = None
    turns: tuple[tuple[str, str], ...] = ()
    prompt: str | None = None
    plain: bool = False
    stream: bool = False
    logprobs: int | None = None


class Written(NamedTuple):
    """A text, the number of tokens read for it (soft tokens included), the number of tokens in it, and these tokens
    with their log-probabilities where a job asks for them."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    tokens: Sequence[TokenScore] = ()


@dataclass(frozen=True)
class Call:
    """Call a method of `Engine` with these arguments."""

    method: Literal["match", "embed", "find", "attend"]
    arguments: tuple[Any, ...]


Job = Write | Call


class Worker:
    """One process. `run` must not be called by two threads at once.

    Args:
        served: what it loads.
        seconds: time for one batch; after it the process is killed.

    Raises:
        UserError: the models cannot be loaded.
    """

    def __init__(self, served: Served, seconds: float) -> None:
        self.served, self.seconds = served, seconds
        self._closed = False
        self._start()

    def run(self, jobs: Sequence[Job], on_text: Callable[[str], object] = lambda text: None) -> list[Any]:
        """Results in the jobs' order; an exception in place of the result of a job that failed.

        If the process dies, each job of the batch is tried again alone, so that only the one that kills it fails.

        Args:
            jobs: one batch.
            on_text: called with each piece of a streamed text.
        """
        try:
            return self._exchange(jobs, on_text)
        except TimeoutError:
            self._restart()
            return [ServeError("the request took longer than the server allows", 503)] * len(jobs)
        except (EOFError, OSError):  # the process died
            self._restart()
            if len(jobs) == 1:
                return [ServeError("the process with the models died while it worked on this request", 503)]
            return [self.run([job], on_text)[0] for job in jobs]

    def cancel(self) -> None:
        """Stops the batch that runs, after the token that is being written."""
        self._stop.value = 1

    def close(self) -> None:
        """Ends the process, which is not started again."""
        self._closed = True
        self._kill()

    def _kill(self) -> None:
        self._process.kill()
        self._process.join()

    def _exchange(self, jobs: Sequence[Job], on_text: Callable[[str], object]) -> list[Any]:
        deadline = time.monotonic() + self.seconds
        self._stop.value = 0
        self._pipe.send(list(jobs))
        while self._pipe.poll(max(0.0, deadline - time.monotonic())):
            kind, value = self._pipe.recv()
            if kind == "results":
                return value
            if kind == "error":
                raise RuntimeError(f"in the process with the models:\n{value}")
            on_text(value)
        raise TimeoutError

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child_pipe = context.Pipe()
        self._stop: Any = context.Value("b", 0, lock=False)  # a process that is killed can hold no lock of it
        args = (self.served, child_pipe, self._stop)
        self._process = context.Process(target=_main, args=args, daemon=True)
        self._process.start()
        child_pipe.close()  # else the end of the process would not end the pipe
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
        RESTARTS.inc()
        try:
            self._start()
        except UserError as error:  # not the client's fault; the next batch tries again
            raise ServeError(f"the models cannot be loaded again: {error}", 503) from error


def _main(served: Served, pipe: Any, stop: Any) -> None:
    """The process: loads the models, sends None or what is wrong, then answers each batch that it receives."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes; the server ends this one
    warnings.filterwarnings("ignore", category=FutureWarning)  # as `cli.main`
    from openblip2.apps.serve.engine import Engine

    try:
        engine = Engine(served, send_text=lambda text: pipe.send(("text", text)), stopped=lambda: bool(stop.value))
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
            reply = ("results", engine.run(jobs))
        except Exception:  # the server logs it and answers 500
            reply = ("error", traceback.format_exc())
        pipe.send(reply)
