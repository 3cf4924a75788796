"""A load test of the server: many clients, each of which sends the next request as soon as it has an answer.

python tests/server_load.py runs/demo/stage2 pictures/ --clients 200 --seconds 120 --batch 16 --batch 1

The server runs in its own processes, started by the command `serve`; the clients are one asyncio loop in this process.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx2
import numpy as np
import psutil

from openblip2.data.images import PICTURE_SUFFIXES

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


def measure(run: str, folder: Path, clients: int, seconds: float, batch: int) -> dict[str, Any]:
    """`Load.figures` of a server.

    Each request is for a caption or an answer about one of the images, both drawn at random. After status 429 a client
    waits as long as the server says.

    Args:
        run: path of a stage-2 run.
        folder: path of a folder of images.
        clients: number of clients.
        seconds: duration.
        batch: `--batch` of the server; 1 = one request at a time.
    """
    pictures = [path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix.lower() in PICTURE_SUFFIXES]
    assert pictures, f"{folder}: no pictures in it"
    command = [sys.executable, "-m", "openblip2", "serve", run, "--port", "0", "--batch", str(batch)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            told = server.stdout.readline()
            assert "http://" in told, f"{run}: the server did not start"
            load = asyncio.run(_press(told.split()[1], server.pid, pictures, clients, seconds))
        finally:
            server.terminate()
    return {"batch": batch, "clients": clients, "seconds": seconds} | load.figures(seconds)


async def _press(address: str, server: int, pictures: list[bytes], clients: int, seconds: float) -> Load:
    load = Load()
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(base_url=address, limits=limits, timeout=120, trust_env=False) as http:
        await _ready(http)
        until = time.monotonic() + seconds
        asking = [_client(http, n, pictures, until, load) for n in range(clients)]
        await asyncio.gather(_watch(server, until, seconds, load), *asking)
    return load


async def _ready(http: httpx2.AsyncClient) -> None:
    for _ in range(STARTS):
        try:
            if (await http.get("/health")).status_code == 200:
                return
        except httpx2.TransportError:  # the server is not ready yet
            await asyncio.sleep(1)
    raise AssertionError(f"the server is not ready after {STARTS} s")


async def _client(http: httpx2.AsyncClient, number: int, pictures: list[bytes], until: float, load: Load) -> None:
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


async def _watch(server: int, until: float, seconds: float, load: Load) -> None:
    process = psutil.Process(server)
    while (left := until - time.monotonic()) > 0:
        every = [process, *process.children(recursive=True)]
        load.memory.append((seconds - left, sum(one.memory_info().rss for one in every)))
        await asyncio.sleep(min(1.0, left))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Load test of the server: prints figures as JSON, a line per batch size."
    )
    parser.add_argument("run", help="stage-2 run")
    parser.add_argument("pictures", type=Path, help="folder of images for the requests")
    parser.add_argument("--clients", type=int, default=200, help="clients that send requests at once")
    parser.add_argument("--seconds", type=float, default=120, help="duration for each batch size")
    parser.add_argument("--batch", type=int, action="append", help="batch size; can be repeated; default: 16")
    asked = parser.parse_args()
    for size in asked.batch or [16]:
        print(json.dumps(measure(asked.run, asked.pictures, asked.clients, asked.seconds, size)), flush=True)
