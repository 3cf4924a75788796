"""Bootstrap confidence intervals: the uncertainty of a score that comes from the choice of the test images.

Images are drawn with replacement, as many as there are, and the score is computed for each draw. The interval contains
the middle 95 % of these scores (percentile interval; Efron, 1979). The questions or captions of one image are drawn
together, because they are not independent. The paper gives no intervals.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
DRAWS = 2000
_AT_ONCE = 4_000_000  # indices held in memory at a time: 32 MiB


@dataclass(frozen=True)
class Interval:
    """A score and the interval that contains 95 % of the draws, all in the unit of the score.

    Attributes:
        n: number of samples.
        groups: number of images, or of samples if they are drawn one by one.
    """

    score: float
    low: float
    high: float
    n: int
    groups: int

    def excludes(self, value: float) -> bool:
        """Whether `value` is outside the interval. A difference between two systems is significant if 0 is outside."""
        return not self.low <= value <= self.high

    def as_json(self) -> dict[str, float]:
        return {"score": self.score, "low": self.low, "high": self.high, "n": self.n}


def mean_interval(
    scores: np.ndarray, groups: Sequence[Hashable] | None = None, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Interval of the mean of per-sample scores.

    For CIDEr-D, it is the mean of the scores per image: the idf of each n-gram comes from all references and is not
    computed again for each draw. BLEU is not a mean: use `interval` with `caption.bleu_counts`.

    Args:
        scores: one score per sample, [n].
        groups: the image of each sample; None = each sample is drawn on its own.
        draws: number of draws.
        seed: seed of the draws.
    """
    scores = np.asarray(scores, dtype=np.float64)
    counts = np.stack([scores, np.ones_like(scores)], axis=1)
    return interval(counts, lambda sums: sums[:, 0] / sums[:, 1], groups, draws, seed)


def difference_interval(first: np.ndarray, second: np.ndarray, groups: Sequence[Hashable] | None = None) -> Interval:
    """Interval of mean(first) - mean(second): scores of two systems for the same samples in the same order, [n] each.

    Each draw takes the same images for both systems, so images that are hard for both do not widen the interval.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    assert first.shape == second.shape, "two systems' scores of the same samples"
    return mean_interval(first - second, groups)


def interval(
    counts: np.ndarray,
    score: Callable[[np.ndarray], np.ndarray],
    groups: Sequence[Hashable] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Interval of a score that is a function of sums over the samples, such as BLEU, which depends on n-gram counts.

    Args:
        counts: [n, k], what each sample adds to the sums.
        score: sums [draws, k] -> scores [draws].
        groups: as in `mean_interval`.
        draws: number of draws.
        seed: seed of the draws.
    """
    assert len(counts) > 0, "at least one sample"
    sums = np.asarray(counts, dtype=np.float64)
    if groups is not None:  # the sums of each group, in the order in which groups first appear: [G, k]
        assert len(groups) == len(counts), "a group for each sample"
        index = {group: n for n, group in enumerate(dict.fromkeys(groups))}
        by_group = np.zeros((len(index), sums.shape[1]))
        np.add.at(by_group, [index[group] for group in groups], sums)
        sums = by_group
    random, found = np.random.default_rng(seed), []
    most = max(1, _AT_ONCE // len(sums))
    for start in range(0, draws, most):
        drawn = random.integers(0, len(sums), size=(min(most, draws - start), len(sums)))
        found.append(score(np.stack([column[drawn].sum(axis=1) for column in sums.T], axis=1)))
    low, high = np.quantile(np.concatenate(found), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    whole = float(score(sums.sum(axis=0, keepdims=True))[0])
    return Interval(whole, float(low), float(high), len(counts), len(sums))
