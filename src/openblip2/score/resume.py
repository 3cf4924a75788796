"""Texts of an evaluation that was interrupted: they are kept beside its result, and not written again."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from openblip2.progress import Progress
from openblip2.runs import write_text


class Kept:
    """`OUT.partial.jsonl`: a line that says what the texts are of, then a line for each group of them.

    Args:
        path: of the file; None = nothing is kept.
        of: all that the texts depend on, but the samples.
    """

    def __init__(self, path: Path | None = None, of: Any = None) -> None:
        self.path, self.of = path, of

    def texts(
        self,
        what: str,
        unit: str,
        samples: Sequence[Any],
        group: int,
        write: Callable[[slice], list[str]],
        progress: Progress,
        how: Any,
    ) -> list[str]:
        """One text for each sample: those that are kept, and `write` for the others, `group` of them at a time.

        Args:
            samples: their ids and questions, which with `how` tell one set of texts from another.
        """
        named = json.dumps([self.of, how, samples], default=str)
        head = json.dumps(hashlib.sha256(named.encode()).hexdigest())
        found = self._read(head)
        with progress.steps(what, len(samples), len(found), unit) as bar:
            for start in range(len(found), len(samples), group):
                texts = write(slice(start, start + group))
                found += texts
                self._add(json.dumps(texts, ensure_ascii=False))
                bar.advance(count=len(texts))
        return found

    def forget(self) -> None:
        """The result is written: the texts are in it."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _read(self, head: str) -> list[str]:
        """The texts of the same samples, if there are any; else the file is begun."""
        if self.path is None:
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n") if self.path.exists() else [""]
        whole = lines[:-1] if lines[0] == head else [head]  # behind the last end of a line stands what was torn
        write_text("".join(f"{line}\n" for line in whole), self.path)
        return [text for line in whole[1:] for text in json.loads(line)]

    def _add(self, line: str) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
