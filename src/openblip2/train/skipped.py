"""What a run leaves out: counted, named on the terminal, and all of it in `RUN/skipped.jsonl`."""

from pathlib import Path

from openblip2.distributed.collectives import is_first, rank
from openblip2.progress import Progress
from openblip2.train.log import Log

SAID = 20  # lines that are said; of the later ones every thousandth


class Skipped:
    """Called with one line for each thing left out, while all processes read the same: the first one writes.

    Attributes:
        count: of the lines so far.
    """

    def __init__(self, run: Path, progress: Progress) -> None:
        self.run, self.progress, self.count = run, progress, 0
        run.mkdir(parents=True, exist_ok=True)
        self._log = Log(run / "skipped.jsonl", writes=is_first())
        for older in run.glob("skipped-*.jsonl") if is_first() else ():
            older.unlink()

    def __call__(self, line: str) -> None:
        self.count += 1
        self._log.write({"skipped": line})
        if self.count <= SAID or self.count % 1000 == 0:
            self.progress.say(f"skipped ({self.count} so far): {line}")

    def in_training(self, line: str) -> None:
        """The same, where each process reads what no other does: process 3 writes `RUN/skipped-3.jsonl`."""
        if not self._log.writes:
            self._log = Log(self.run / f"skipped-{rank()}.jsonl")
        self(line)
