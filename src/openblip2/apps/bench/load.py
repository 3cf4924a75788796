"""A server under load: many clients, each of which sends the next request as soon as it has an answer.

The server runs in its own processes, started by the command `serve`; the clients are one asyncio loop in this process.
"""

import asyncio
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from openblip2.data.images import PICTURE_SUFFIXES
from openblip2.errors import UserError
from openblip2.progress import Bar, Progress
from openblip2.weights.source import read_checkpoint

QUESTION = "what is in the picture?"
STARTS = 300  # seconds that the server may take to load its models


@dataclass
class Load:
    """What the clients measured.

    Attributes:
        statuses: number of answers by HTTP status, and of errors by name.
        seconds: latency of each answered request.
        memory: (seconds since the beginning, bytes of the server's processes).
    """

    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)

    def figures(self, duration: float) -> dict[str, Any]:
        """Requests per second, latencies in seconds, memory in bytes, and its growth after the warm-up.

        Growth compares the means of the last and the second quarter of the time, because batches differ in memory.
        """
        took = np.array(self.seconds or [np.nan])
        second, last = (
            np.mean([size for at, size in self.memory if begin * duration <= at < end * duration] or [np.nan])
            for begin, end in ((0.25, 0.5), (0.75, 1))
        )
        return {
            "answered": len(self.seconds),
            "per_second": len(self.seconds) / duration,
            "p50": float(np.percentile(took, 50)),
            "p95": float(np.percentile(took, 95)),
            "statuses": dict(self.statuses),
            "errors": sum(count for status, count in self.statuses.items() if status not in ("200", "429")),
            "memory": max((size for _, size in self.memory), default=0),
            "memory_grew": float(last / second - 1),
            "memory_over_time": [[round(at), size] for at, size in self.memory[::10]],
        }


def bench_serve(
    run: str, folder: Path, clients: int, seconds: float, batches: Sequence[int], progress: Progress
) -> list[dict[str, Any]]:
    """`Load.figures` of a server for each batch size.

    Each request is for a caption or an answer about one of the images, both drawn at random. After status 429 a client
    waits as long as the server says.

    Args:
        folder: of images.
        seconds: duration for each batch size.
        batches: `--batch` of the server; 1 = one request at a time.

    Raises:
        UserError: no images, a server that does not start, or a missing package.
    """
    try:
        import httpx2  # noqa: F401
        import psutil  # noqa: F401
    except ImportError as error:
        raise UserError(f"bench-serve needs {error.name}: pip install 'openblip2[load]'") from error
    if read_checkpoint(run).settings.stage == "stage1":
        raise UserError(f"{run} is a stage-1 run, which cannot write text: give a stage-2 run")
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    pictures = [file.read_bytes() for file in files if file.suffix.lower() in PICTURE_SUFFIXES and file.is_file()]
    if not pictures:
        raise UserError(f"{folder}: no pictures in it: give a folder of pictures")
    found = []
    for batch in batches:
        command = [sys.executable, "-m", "openblip2", "serve", run, "--port", "0", "--batch", str(batch)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                told = server.stdout.readline()
                if "http://" not in told:
                    raise UserError(f"{run}: the server did not start")
                with progress.steps(f"{clients} clients, batches of {batch}", round(seconds), unit="s") as bar:
                    load = asyncio.run(_press(told.split()[1], server.pid, pictures, clients, seconds, bar))
            finally:
                server.terminate()
        found.append({"batch": batch, "clients": clients, "seconds": seconds} | load.figures(seconds))
    return found


async def _press(address: str, server: int, pictures: list[bytes], clients: int, seconds: float, bar: Bar) -> Load:
    import httpx2

    load = Load()
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(base_url=address, limits=limits, timeout=120, trust_env=False) as http:
        await _ready(http)
        until = time.monotonic() + seconds
        asking = [_client(http, n, pictures, until, load) for n in range(clients)]
        await asyncio.gather(_watch(server, until, seconds, load, bar), *asking)
    return load


async def _ready(http: Any) -> None:
    import httpx2

    for _ in range(STARTS):
        try:
            if (await http.get("/health")).status_code == 200:
                return
        except httpx2.TransportError:  # not yet
            await asyncio.sleep(1)
    raise UserError(f"the server is not ready after {STARTS} s")


async def _client(http: Any, number: int, pictures: list[bytes], until: float, load: Load) -> None:
    import httpx2

    random = Random(number)
    while time.monotonic() < until:
        content = random.choice(pictures)
        path, data = random.choice((("/caption", {}), ("/answer", {"question": QUESTION})))
        began = time.monotonic()
        try:
            answer = await http.post(path, files={"image": content}, data=data)
        except httpx2.HTTPError as error:
            load.statuses[type(error).__name__] += 1
            continue
        load.statuses[str(answer.status_code)] += 1
        if answer.status_code == 200 and time.monotonic() <= until:
            load.seconds.append(time.monotonic() - began)
        elif answer.status_code == 429:
            await asyncio.sleep(float(answer.headers["retry-after"]))


async def _watch(server: int, until: float, seconds: float, load: Load, bar: Bar) -> None:
    import psutil

    process = psutil.Process(server)
    while (left := until - time.monotonic()) > 0:
        every = [process, *process.children(recursive=True)]
        load.memory.append((seconds - left, sum(one.memory_info().rss for one in every)))
        await asyncio.sleep(min(1.0, left))
        bar.advance()
