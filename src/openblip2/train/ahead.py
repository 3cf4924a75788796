"""Batches made one ahead: while the model works on batch n, a thread reads batch n + 1."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from openblip2.data.batches import PairBatch


class Ahead:
    """`batches(number)` for numbers that mostly follow one another; the same batches, in less waiting.

    One thread and no process: decoding and copying leave Python free. A batch depends on its number alone, so nothing
    depends on when it is made. What making one raises is raised where it is asked for. For GPUs batches
    come in pinned memory, from which a copy does not hold up the model.

    Args:
        batches: number -> batch; asked from one thread at a time. count: of the run; none is made beyond it.
    """

    def __init__(self, batches: Callable[[int], PairBatch], count: int) -> None:
        self.batches, self.count = batches, count
        self.thread = ThreadPoolExecutor(1, "batches")
        self.number, self.next = -1, Future[PairBatch]()  # what is being made

    def __call__(self, number: int) -> PairBatch:
        batch = (self.next if number == self.number else self.thread.submit(self._make, number)).result()
        self.number = number + 1
        if self.number < self.count:
            self.next = self.thread.submit(self._make, self.number)
        return batch

    def _make(self, number: int) -> PairBatch:
        batch = self.batches(number)
        if not torch.cuda.is_available():
            return batch
        images, features = (None if part is None else part.pin_memory() for part in (batch.images, batch.features))
        return replace(batch, images=images, features=features)
