"""What an evaluation found: scores with intervals, the protocol card, and one line for each sample."""

import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from openblip2.evaluate.intervals import Interval, interval, mean_interval
from openblip2.runs import atomic_write, write_json


@dataclass
class Result:
    """Scores of one task, filled piece by piece.

    Attributes:
        task: caption, vqa or retrieval.
        pictures: how many were scored.
        seed: of the bootstrap.
        scores: by name.
        alone: scores without an interval, by name.
        beside: what the scores are to be read beside.
        protocol: what they depend on.
        skipped: one line for each entry or picture left out.
        warnings: in words.
        samples: one row each.
    """

    task: str
    pictures: int
    seed: int = 0
    scores: dict[str, Interval] = field(default_factory=dict)
    alone: dict[str, float] = field(default_factory=dict)
    beside: dict[str, Any] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, scores: Sequence[float] | np.ndarray, groups: Sequence[Hashable] | None = None) -> None:
        """The mean of per-sample scores, with its interval over pictures: `groups` says whose each sample is."""
        self.scores[name] = mean_interval(np.asarray(scores, dtype=np.float64), groups, seed=self.seed)

    def add_counts(self, name: str, counts: np.ndarray, score: Callable[[np.ndarray], np.ndarray]) -> None:
        """A score that is a function of sums over the pictures."""
        self.scores[name] = interval(counts, score, seed=self.seed)

    def as_json(self) -> dict[str, Any]:
        """All but the samples."""
        level = next((score.level for score in self.scores.values()), None)
        return {
            "task": self.task,
            "pictures": self.pictures,
            "scores": {
                name: {"score": score.score, "low": score.low, "high": score.high, "n": score.n}
                for name, score in self.scores.items()
            }
            | {name: {"score": score} for name, score in self.alone.items()},
            **({"beside": self.beside} if self.beside else {}),
            "intervals": f"{level:.0%}, percentile bootstrap over pictures" if level else None,
            "protocol": self.protocol,
            "warnings": self.warnings,
            "skipped": {"count": len(self.skipped), "first": self.skipped[:20]},
        }

    def in_words(self) -> list[str]:
        """A line for each score, then the warnings."""
        width = max(map(len, [*self.scores, *self.alone]), default=0)
        lines = [
            f"{name:{width}} {100 * s.score:7.2f}  [{100 * s.low:.2f}, {100 * s.high:.2f}]"
            for name, s in self.scores.items()
        ]
        lines += [f"{name:{width}} {100 * score:7.2f}" for name, score in self.alone.items()]
        return [*lines, *(f"warning: {warning}" for warning in self.warnings)]

    def write(self, out: Path) -> Path:
        """Writes `out` and, beside it, `NAME.samples.jsonl`, each whole or not at all; returns the second."""
        beside = out.with_suffix(".samples.jsonl")
        with atomic_write(beside) as draft, draft.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self.samples)
        write_json(self.as_json() | {"samples": beside.name}, out)
        return beside
