"""Steps whose losses or gradients are not finite: left out and counted; too many in a row end the run.

One bad batch (a picture that is one colour, a caption of one letter, an overflow) must not cost a run of days: without
its step the weights stay good. Many in a row mean that the weights are not, or the data.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from openblip2.data.batches import PairBatch
from openblip2.distributed.collectives import is_first, rank
from openblip2.errors import UserError
from openblip2.runs import write_json
from openblip2.train.resume import Done


class RecordingBatches:
    """`batches(number)`, with the names of what was in the last `count` of them, for the case that they are bad."""

    def __init__(self, batches: Callable[[int], PairBatch], count: int) -> None:
        self.batches = batches
        self.last: deque[tuple[int, PairBatch]] = deque(maxlen=count)

    def __call__(self, number: int) -> PairBatch:
        batch = self.batches(number)
        self.last.append((number, replace(batch, features=None, images=None)))
        return batch

    def samples(self) -> list[dict[str, Any]]:
        """Of each sample of the last batches: the number of its batch, its id, its caption."""
        return [
            {"batch": number, "process": rank(), "sample": name, "caption": caption}
            for number, batch in self.last
            for name, caption in zip(batch.names or [None] * len(batch.captions), batch.captions, strict=True)
        ]


def not_finite(values: Mapping[str, float]) -> dict[str, str]:
    """Those of the values that are NaN or infinite, in words: `{"itm": "itm = nan"}`."""
    return {name: f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)}


def count_step(done: Done, batches: int, bad: bool) -> Done:
    """How far a run is after one more step, of so many batches."""
    return Done(
        step=done.step + 1,
        batches=done.batches + batches,
        bad_steps=done.bad_steps + bad,
        bad_in_a_row=done.bad_in_a_row + 1 if bad else 0,
        data=done.data,
    )


def give_up(run: Path, done: Done, broken: Mapping[str, str], samples: list[dict[str, Any]]) -> None:
    """Ends a run behind its last bad step.

    Raises:
        UserError: always; the last step's samples, over all processes, are then in `RUN/bad_batch.json`.
    """
    if is_first():
        row = {"step": done.step, "bad": list(broken.values()), "bad_in_a_row": done.bad_in_a_row, "samples": samples}
        write_json(row, run / "bad_batch.json")
    raise UserError(
        f"step {done.step}: {', '.join(broken.values())}; such steps change "
        f"nothing, but this is number {done.bad_in_a_row} in a row (train.most_bad_steps): look at the samples in "
        f"{run / 'bad_batch.json'}, or try a smaller optim.lr, optim.clip=1.0 or train.precision=fp32"
    )
