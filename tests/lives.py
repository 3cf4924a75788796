"""Processes that train and can be killed. A server that has imported torch forks them in milliseconds.

python lives.py MODULE...    reads jobs, one line of JSON each, and answers each with a line
"""

import importlib
import json
import mmap
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openblip2

PHASE = mmap.mmap(-1, 1)  # shared by a process and those it forks: the current phase
SLOW_IMPORTS = ("torch._dynamo", "rich.console")  # every training imports them at its beginning
AT = ("start", "training", "checkpoint", "validation", "end")


class Lives:
    """The server as a context manager. It imports `modules` before it forks."""

    def __init__(self, *modules: str) -> None:
        self.modules = modules

    def __enter__(self) -> "Lives":
        places = [str(Path(__file__).parent), str(Path(openblip2.__file__).parents[1])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, *self.modules]
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(timeout=60)

    def live(
        self,
        function: Callable[..., object],
        *arguments: Any,
        processes: int = 1,
        seconds: float | None = None,
        since: str = "start",
    ) -> tuple[list[int], str]:
        """Calls a function in new processes and returns the exit code of each and the last phase.

        Exit codes: 0 = it returned, -9 = it was killed. With several processes, each gets its number as first argument.

        Args:
            seconds: CPU time after which it is killed: the same point on a busy machine and on an idle one.
            since: the phase of `AT` with which the CPU time begins.
        """
        job = [function.__module__, function.__name__, arguments, processes, seconds, AT.index(since)]
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(job, default=str) + "\n")
        self.server.stdin.flush()
        codes, phase = json.loads(self.server.stdout.readline())
        return codes, AT[phase]


def serve() -> None:
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        module, name, arguments, processes, seconds, since = json.loads(line)
        PHASE[0] = 0
        children = [_fork(module, name, ([n] if processes > 1 else []) + arguments) for n in range(processes)]
        codes: dict[int, int] = {}
        began = None
        while len(codes) < processes:
            time.sleep(0.0005)
            for child in children:
                if child not in codes:
                    ended, status = os.waitpid(child, os.WNOHANG)
                    if ended:
                        codes[child] = os.waitstatus_to_exitcode(status)
            if seconds is not None and not codes:
                now = _computed(children[0])
                began = now if began is None and PHASE[0] == since else began
                if began is not None and now - began >= seconds:
                    for child in children:
                        os.kill(child, signal.SIGKILL)
                    seconds = None
        sys.stdout.write(json.dumps([[codes[child] for child in children], PHASE[0]]) + "\n")
        sys.stdout.flush()


def _fork(module: str, name: str, arguments: list[Any]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        getattr(importlib.import_module(module), name)(*arguments)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _computed(process: int) -> float:
    """CPU time of a process in seconds (Linux: the clock id is built as clock_getcpuclockid does)."""
    try:
        return time.clock_gettime((~process << 3) | 2)
    except OSError:
        return 0.0  # the process has just ended


def die_at(count: int, folder: str) -> None:
    """Kills this process, without cleanup, before operation `count` on files in a folder; 0 = the first."""
    names = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir"}
    left = [count]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in names and str(arguments[0]).startswith(folder):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1

    sys.addaudithook(hook)


if __name__ == "__main__":
    sys.modules["lives"] = sys.modules["__main__"]  # so that there is only one PHASE
    serve()
