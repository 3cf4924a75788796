"""Texts of an interrupted evaluation: they are kept beside its result, so that they are not generated again."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from openblip2.progress import Progress
from openblip2.runs import write_text


class PartialTexts:
    """`OUT.partial.jsonl`: a digest of what the texts depend on, then a line for each group of texts.

    Args:
        path: of the file; None = nothing is kept.
        of: all that the texts depend on, except the samples.
    """

    def __init__(self, path: Path | None = None, of: Any = None) -> None:
        self.path, self.of = path, of

    def texts(
        self,
        what: str,
        unit: str,
        samples: Sequence[Any],
        group: int,
        generate: Callable[[slice], list[str]],
        progress: Progress,
        how: Any,
    ) -> list[str]:
        """One text for each sample: those in the file, and new ones for the others.

        Args:
            samples: ids and questions; texts in the file are used only if these and `how` are the same.
            group: number of samples that are generated and written together.
            generate: the texts of a slice of the samples.
            how: prompt and decoding.
        """
        depends_on = json.dumps([self.of, how, samples], default=str)
        found = self._read(json.dumps(hashlib.sha256(depends_on.encode()).hexdigest()))
        with progress.steps(what, len(samples), len(found), unit) as bar:
            for start in range(len(found), len(samples), group):
                texts = generate(slice(start, start + group))
                found += texts
                if self.path is not None:
                    with self.path.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(texts, ensure_ascii=False) + "\n")
                bar.advance(count=len(texts))
        return found

    def remove(self) -> None:
        """Removes the file, once the result contains the texts."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _read(self, digest: str) -> list[str]:
        """The texts in the file if it begins with this digest; otherwise a new file is begun."""
        if self.path is None:
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n") if self.path.exists() else [""]
        complete = lines[:-1] if lines[0] == digest else [digest]  # after the last line end is an unfinished line
        write_text("".join(f"{line}\n" for line in complete), self.path)
        return [text for line in complete[1:] for text in json.loads(line)]
