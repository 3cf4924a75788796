"""The processes of one training run: how they connect, exchange numbers, wait, and all end when one of them fails.

torchrun and accelerate launch start them with the variables that `torch.distributed` reads (RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR, MASTER_PORT). Without these there is one process, and this module has no effect.
"""

import atexit
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from openblip2.distributed.collectives import is_first, patient_group, world_size
from openblip2.errors import Stopped, UserError, one_line
from openblip2.hardware import device

LOOKS = 1.0  # seconds between two checks whether another process has failed
GRACE = 2.0  # seconds that a failed process has to print its error before the others end
_FAILED = "failed"  # key in the shared store: the rank of the first process that failed


@contextmanager
def processes() -> Iterator[None]:
    """Connects the processes that a launcher has started; each gets the GPU of its LOCAL_RANK.

    An error in one process ends all of them: the process that fails first raises it, and the others end silently with
    exit code 2, even if they wait for a message that will never come. `Stopped` also ends all; only rank 0 raises it.

    Raises:
        UserError: The variables are inconsistent, or the connection to another process is lost.
    """
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    store, number, count = _meet()
    watch = _Watch(store)
    try:
        watch.start()
        dist.init_process_group(_backend(), store=PrefixStore("training", store), rank=number, world_size=count)
        patient_group()  # now, because all processes must take part
        yield
        watch.over.set()  # before any process ends, because the store may end with the first one
        dist.barrier(group=patient_group())
    except Stopped as stopped:
        watch.over.set()
        if number:
            raise SystemExit(stopped.code) from None
        raise
    except Exception as error:
        if not watch.claim(number):
            time.sleep(GRACE)
            raise SystemExit(2) from None
        atexit.register(_stay, store)  # after the error has been printed
        # What gloo, NCCL and the store say if another process has ended.
        lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
        if isinstance(error, dist.DistError) or any(text in str(error) for text in lost):
            raise UserError(
                f"process {number} lost the connection to another one, which was killed or ran out of memory "
                f"({one_line(error)}): start again with --resume"
            ) from error
        raise
    dist.destroy_process_group()


@contextmanager
def first_process_first() -> Iterator[None]:
    """Runs the block in the first process while the others wait, for hours if needed; then the others run it."""
    if world_size() == 1:
        yield
        return
    if not is_first():
        dist.barrier(group=patient_group())
    yield
    if is_first():
        dist.barrier(group=patient_group())


def highest(values: list[int]) -> list[int]:
    """The largest value of each integer over all processes."""
    if world_size() == 1:
        return values
    largest = torch.tensor(values)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=patient_group())
    return largest.tolist()


def from_all(value: Any) -> list[Any]:
    """The values of all processes in rank order; they are sent as JSON."""
    if world_size() == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode("ascii")), dtype=torch.uint8)
    (longest,) = highest([len(text)])
    padded = torch.full((longest,), ord(" "), dtype=torch.uint8)
    padded[: len(text)] = text
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded, group=patient_group())
    return [json.loads(bytes(part.tolist())) for part in parts]


def wait_for_all() -> None:
    """Returns after every process has called it."""
    highest([0])


def _meet() -> tuple[Store, int, int]:
    from torch.distributed.rendezvous import rendezvous

    try:
        return next(rendezvous("env://"))
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"RANK={os.environ['RANK']} is set, but the processes cannot connect ({one_line(error)}): start them with "
            "torchrun or accelerate launch (docs/clusters.md)"
        ) from error


def _backend() -> str:
    if device().type != "cuda":
        return "gloo"
    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= gpus:
        raise UserError(f"LOCAL_RANK={local}, but this machine has {gpus} GPUs: start one process for each GPU")
    torch.cuda.set_device(local)
    return "cpu:gloo,cuda:nccl"


def _stay(store: Store) -> None:
    """Keeps the store, which this process may host, until the others have read in it that this process failed."""
    time.sleep(LOOKS + GRACE + 1.0)
    del store


class _Watch(threading.Thread):
    """Ends this process if another one has failed, because it may wait for that one in a call that never returns."""

    def __init__(self, store: Store) -> None:
        super().__init__(name="watch", daemon=True)
        # A separate connection, because the other one is in use while the process waits for something in the store.
        self.store: Store = store.clone()  # pyright: ignore[reportAttributeAccessIssue] # its stub forgets it
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(LOOKS):
            try:
                failed = self.store.check([_FAILED])
            except Exception:  # of any type: the process that hosts the store has ended
                failed = True
            if failed and not self.over.wait(GRACE):
                os._exit(2)

    def claim(self, number: int) -> bool:
        """Reports that this process failed; returns whether it is the first one that failed."""
        self.over.set()
        try:
            return self.store.compare_set(_FAILED, "", str(number)) == str(number).encode()
        except RuntimeError:  # the store has ended with the process that failed
            return False
