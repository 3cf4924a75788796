"""Progress on the terminal: a bar with losses and time left; plain lines now and then when it is not a terminal."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Bar:
    """One running bar; `advance` after each step."""

    def __init__(self, advance) -> None:
        self.advance = advance


class Progress:
    """Where a long job says how it is doing: standard error, so that standard output stays for results."""

    def __init__(self, quiet: bool = False) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.quiet = quiet
        self.fancy = self.console.is_terminal and not quiet

    def say(self, text: str) -> None:
        """One line, kept above the bar."""
        if not self.quiet:
            self.console.print(text, markup=False)
            sys.stderr.flush()

    @contextmanager
    def steps(self, what: str, total: int, done: int = 0) -> Iterator[Bar]:
        """A bar over `total` steps of which `done` are behind; its `advance` takes losses by name to show."""
        if not self.fancy:
            yield Bar(self._lines(what, total, done))
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=self.console) as bars:
            task = bars.add_task(what, total=total, completed=done, losses="")

            def advance(losses: dict[str, float] | None = None, count: int = 1) -> None:
                bars.update(task, advance=count, losses=_named(losses or {}))

            yield Bar(advance)

    def _lines(self, what: str, total: int, done: int):
        began, said = time.monotonic(), time.monotonic()
        at = done

        def advance(losses: dict[str, float] | None = None, count: int = 1) -> None:
            nonlocal at, said
            at += count
            now = time.monotonic()
            if now - said > 15 or at >= total:
                said = now
                left = (now - began) / max(1, at - done) * (total - at)
                self.say(f"{what} {at}/{total} {_named(losses or {})} {left:.0f} s left")

        return advance


def _named(losses: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.3f}" for name, value in losses.items())
