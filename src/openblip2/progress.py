"""Shows progress on standard error, so that standard output contains only results.

On a terminal, it shows bars with a rate and the remaining time. Elsewhere, long jobs print a plain line every 15
seconds, for the logs of batch jobs, and short jobs print nothing.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

EVERY = 15.0  # seconds between two plain lines
SHORT = 2.0  # seconds; the bar of a shorter job is removed at its end


class Bar:
    """A running progress bar; call `advance` after each step."""

    def __init__(self, advance) -> None:
        self.advance = advance


class Progress:
    """Shows the progress of long jobs; nothing is shown with `quiet`."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.quiet = quiet
        self.fancy = self.console.is_terminal and not quiet

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if not self.quiet:
            self.console.print(text, markup=False)
            sys.stderr.flush()

    def doing(self, text: str) -> None:
        """Announces a job without a bar that may take a while: a line on a terminal, nothing elsewhere."""
        if self.fancy:
            self.say(f"{text} ...")

    @contextmanager
    def steps(self, what: str, total: int, done: int = 0, unit: str = "pictures") -> Iterator[Bar]:
        """A bar over `total` steps, `done` of which are already complete; its `advance` can show losses by name."""
        if not self.fancy:
            yield Bar(self._lines(what, total, done, unit))
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[losses]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        began, at = time.monotonic(), done
        # If standard output is a terminal, too, results are printed above the bar; if it is a file, they are written
        # directly. The rate is measured over ten minutes, because a single step may take one minute.
        with RichProgress(
            *columns, console=self.console, redirect_stdout=sys.stdout.isatty(), speed_estimate_period=600
        ) as bars:
            task = bars.add_task(what, total=total, completed=done, losses="", rate="")

            def advance(losses: dict[str, float] | None = None, count: int = 1) -> None:
                nonlocal at
                at += count
                rate = _rate(at - done, time.monotonic() - began, unit)
                bars.update(task, advance=count, losses=_named(losses or {}), rate=rate)

            yield Bar(advance)
            bars.live.transient = time.monotonic() - began < SHORT

    def _lines(self, what: str, total: int, done: int, unit: str):
        began = said = time.monotonic()
        at = done

        def advance(losses: dict[str, float] | None = None, count: int = 1) -> None:
            nonlocal at, said
            at += count
            now = time.monotonic()
            if now - said > EVERY or (at >= total and now - began > EVERY):
                said = now
                left = (now - began) / max(1, at - done) * (total - at)
                rate = _rate(at - done, now - began, unit)
                told = (f"{what} {at}/{total}", rate, _named(losses or {}), f"{left:.0f} s left")
                self.say(" ".join(filter(None, told)))

        return advance


def _rate(count: int, seconds: float, unit: str) -> str:
    """The rate per second or per minute if that is at least 1, otherwise per hour."""
    a_second = count / max(seconds, 1e-9)
    period, name = next(((p, name) for p, name in ((1, "s"), (60, "min")) if a_second * p >= 1), (3600, "h"))
    return f"{a_second * period:.1f} {unit}/{name}"


def _named(losses: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.3f}" for name, value in losses.items())
