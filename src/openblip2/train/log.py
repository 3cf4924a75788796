"""`log.jsonl`, which has one JSON object per line for each event of a run, and optional experiment trackers."""

import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from openblip2.errors import UserError, one_line
from openblip2.runs import write_text

Tracker = Literal["", "tensorboard", "wandb", "trackio"]


class Log:
    """A log to which rows are appended during a run. A resumed run removes the rows after its checkpoint's step.

    Args:
        keep_steps: Keep the existing rows up to this step; None = start a new log.
        writes: False for processes that only read the log, because one process of a run writes it.
        track: Called with each row that is written.

    Attributes:
        validated: The steps that have a validation row.
        torn: Number of dropped lines that were not JSON; a process that is killed may leave half a line.
    """

    def __init__(
        self,
        path: Path,
        keep_steps: int | None = None,
        writes: bool = True,
        track: Callable[[Mapping[str, Any]], object] = lambda row: None,
    ) -> None:
        self.path, self.writes, self.track, self.torn = path, writes, track, 0
        rows = []
        if keep_steps is not None and path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                row = _row(line)
                # Steps after the checkpoint are repeated, so their old rows would be duplicates.
                if row is None:
                    self.torn += 1
                elif row.get("step", 0) <= keep_steps:
                    rows.append(row)
        self.validated = {row["step"] for row in rows if "validation" in row}
        # Rewritten even if no row is dropped, because an incomplete last line would corrupt the next row.
        if writes:
            write_text("".join(json.dumps(row) + "\n" for row in rows), path)

    def write(self, row: dict[str, Any]) -> None:
        # Opened for each row, so that another program can read all rows at any time.
        if self.writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self.track(row)

    def rows(self) -> list[dict[str, Any]]:
        """All rows that are in the file now."""
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log. The run may still be training, so an incomplete last line is ignored.

    Raises:
        UserError: There is no log, it has no step yet, or a line is not a row.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): give a run that has begun") from error
    rows: list[dict[str, Any]] = []
    for n, line in enumerate(lines):
        row = _row(line)
        if row and isinstance(row.get("step"), int):
            rows.append(row)
        elif n < len(lines) - 1:  # the last line may be incomplete
            raise UserError(f"{path}: line {n + 1} is not a row of a log: give a run that `openblip2 train` wrote")
    if not rows:
        raise UserError(f"{path}: has no step yet: try again later")
    return rows


def _row(line: str) -> dict[str, Any] | None:
    """Parses a line as a JSON object; None if it is not one."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def open_tracker(kind: Tracker, run: Path, settings: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], None]:
    """Returns a function that sends a row of the log to an experiment tracker; "" is none.

    Args:
        settings: The settings of the run, for trackers that display them.

    Raises:
        UserError: The tracker is not installed, or it cannot start, for example because nobody is logged in.
    """
    if not kind:
        return lambda row: None
    terminal = sys.stdin
    try:
        sys.stdin = open(os.devnull)  # noqa: SIM115  (wandb asks for a key where there is a terminal; jobs would wait)
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(run / "tensorboard"))

            def write(row: Mapping[str, Any]) -> None:
                for name, value in numbers(row).items():
                    writer.add_scalar(name, value, row["step"])
                writer.flush()  # so that a killed run keeps its curves

            return write
        module = importlib.import_module(kind)
        # With the same id, a resumed run continues in the same chart; trackio goes by the name.
        only_wandb = {"dir": str(run), "id": run.name} if kind == "wandb" else {}
        module.init(project="openblip2", name=run.name, resume="allow", config=dict(settings), **only_wandb)
    except ImportError as error:
        raise UserError(f"train.track={kind}: pip install {kind} ({error.name} is missing)") from error
    except Exception as error:  # each tracker raises errors of its own types
        help_ = "run `wandb login`, or set WANDB_MODE=offline" if kind == "wandb" else "choose another train.track"
        raise UserError(f"train.track={kind}: {kind} does not start ({one_line(error)}): {help_}") from error
    finally:
        sys.stdin.close()
        sys.stdin = terminal
    return lambda row: module.log(numbers(row), step=row["step"])


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row by name: "training/itc", "held out/tr@1"."""
    held_out = row.get("validation", {})
    return {f"training/{name}": value for name, value in row.items() if _is_number(value) and name != "step"} | {
        f"held out/{name}": value for name, value in held_out.items() if _is_number(value)
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)  # in Python, True is an int
