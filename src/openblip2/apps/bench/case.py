"""One comparison: what `openblip2 bench` times."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

OURS, NAIVE, THEIRS = "openblip2", "naive", "transformers"


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        candidates: by name, ours among them; each does the same work.
        samples: of one run, of what `unit` says.
        difference: the largest relative difference between their outputs, measured before.
        equal: what is allowed.
    """

    name: str
    candidates: Mapping[str, Callable[[], Any]]
    samples: int
    unit: str
    difference: float
    equal: float
