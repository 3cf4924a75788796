"""`log.jsonl`: what happened in a run, one JSON object a line."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from openblip2.errors import UserError


class Log:
    """Lines appended as things happen. A resumed run drops what came after its step.

    Args:
        keep_steps: keep what is there up to this step; None = begin anew.
        writes: False for processes that only read along: one of a run's processes writes.
        tell: is called with each row that is written.

    Attributes:
        validated: the steps that were validated. torn: how many lines were no JSON and were dropped: a process that is
            killed may leave half a line.
    """

    def __init__(
        self,
        path: Path,
        keep_steps: int | None = None,
        writes: bool = True,
        tell: Callable[[Mapping[str, Any]], object] = lambda row: None,
    ) -> None:
        self.path, self.writes, self.tell, self.torn = path, writes, tell, 0
        rows = []
        if keep_steps is not None and path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if not isinstance(row, dict):
                    self.torn += 1
                elif row.get("step", 0) <= keep_steps:
                    rows.append(row)
        self.validated = {row["step"] for row in rows if "validation" in row}
        if writes:
            fresh = path.with_name(path.name + ".new")
            fresh.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            os.replace(fresh, path)

    def write(self, row: dict[str, Any]) -> None:
        if self.writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self.tell(row)

    def rows(self) -> list[dict[str, Any]]:
        """All that is there now."""
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def to_disk(self) -> None:
        """Sees to it that what was written outlives a power cut, as the checkpoint that counts on it does."""
        if self.writes:
            with self.path.open("ab") as file:
                os.fsync(file.fileno())


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log, which may be that of a run that is still training: half a line at its end is left out.

    Raises:
        UserError: no log, no step yet, or a line that is no row.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): give a run that has begun") from error
    rows: list[dict[str, Any]] = []
    for n, line in enumerate(lines):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        elif n < len(lines) - 1:
            raise UserError(f"{path}: line {n + 1} is no row of a log; what `openblip2 train` wrote")
    if not rows:
        raise UserError(f"{path}: has no step yet; look again later")
    return rows
