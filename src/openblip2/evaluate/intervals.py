"""How far a score could be off by the luck of which pictures were asked about: bootstrap confidence intervals.

Pictures are drawn again with replacement, as many as there are, and the score is taken of each draw; the interval
holds the middle 95 % of those scores (percentile interval; Efron, 1979). What a picture has several of, questions or
captions, is drawn together: they are not independent. Nothing here is the paper's, which gives no intervals.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

LEVEL = 0.95
DRAWS = 2000
_AT_ONCE = 4_000_000  # drawn places held at a time: 32 MiB


@dataclass(frozen=True)
class Interval:
    """A score and where it lies in `level` of the draws, all in the score's own unit.

    Attributes:
        n: samples.
        groups: what was drawn, pictures or the samples themselves.
        level: in (0, 1).
    """

    score: float
    low: float
    high: float
    n: int
    groups: int
    draws: int = DRAWS
    level: float = LEVEL
    seed: int = 0

    def excludes(self, value: float) -> bool:
        """Whether `value` lies outside: for a difference, 0 outside tells one system from the other."""
        return not self.low <= value <= self.high

    def as_log(self) -> dict[str, Any]:
        return asdict(self)


def mean_interval(
    scores: np.ndarray,
    groups: Sequence[Hashable] | None = None,
    draws: int = DRAWS,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Interval of the mean of per-sample scores.

    For CIDEr-D, the mean of its per-picture scores: the idf of each n-gram stays that of all references and is not
    drawn again. For BLEU, which is no mean, `interval` with `caption_metrics.bleu_counts`.

    Args:
        scores: [n].
        groups: the picture of each sample; None = each sample is drawn for itself.
    """
    scores = np.asarray(scores, dtype=np.float64)
    return interval(np.stack([scores, np.ones_like(scores)], axis=1), _ratio, groups, draws, level, seed)


def difference_interval(
    first: np.ndarray,
    second: np.ndarray,
    groups: Sequence[Hashable] | None = None,
    draws: int = DRAWS,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Interval of mean(first) - mean(second), two systems' scores of the same samples in the same order, [n] each.

    Paired: each draw takes the same pictures for both, which leaves out what is hard for both alike.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    assert first.shape == second.shape, "two systems' scores of the same samples"
    return mean_interval(first - second, groups, draws, level, seed)


def interval(
    counts: np.ndarray,
    score: Callable[[np.ndarray], np.ndarray],
    groups: Sequence[Hashable] | None = None,
    draws: int = DRAWS,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Interval of a score that is a function of sums over the samples, as BLEU is of its n-gram counts.

    Args:
        counts: [n, k], what each sample adds.
        score: sums [draws, k] -> scores [draws].
        groups, draws, level, seed: as above.
    """
    assert len(counts) > 0, "at least one sample"
    assert 0 < level < 1, "a level between 0 and 1"
    sums = _by_group(np.asarray(counts, dtype=np.float64), groups)
    random = np.random.default_rng(seed)
    found = []
    for size in _parts(draws, max(1, _AT_ONCE // len(sums))):
        drawn = random.integers(0, len(sums), size=(size, len(sums)))
        found.append(score(np.stack([column[drawn].sum(axis=1) for column in sums.T], axis=1)))
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    whole = float(score(sums.sum(axis=0, keepdims=True))[0])
    return Interval(whole, float(low), float(high), len(counts), len(sums), draws, level, seed)


def _by_group(counts: np.ndarray, groups: Sequence[Hashable] | None) -> np.ndarray:
    """Sums of `counts [n, k]` over each group, in the order the groups first appear: [G, k]."""
    if groups is None:
        return counts
    assert len(groups) == len(counts), "a group for each sample"
    places = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    sums = np.zeros((len(places), counts.shape[1]))
    np.add.at(sums, [places[group] for group in groups], counts)
    return sums


def _parts(total: int, most: int) -> list[int]:
    return [min(most, total - start) for start in range(0, total, most)]


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[:, 0] / sums[:, 1]
