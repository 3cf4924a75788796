"""What the trials of a study say: figures with intervals, and whether its claims hold, computed and not judged.

Two kinds of luck are told apart: which pictures are asked about (95 % intervals, bootstrap over test pictures, paired
where two ways are compared), and how training fell out (the figure of each seed).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from openblip2.apps.studies.design import LOSS, LOWER, Claim
from openblip2.apps.studies.trial import Points, Trial
from openblip2.evaluate.intervals import difference_interval, mean_interval


def figure(trials: Sequence[Trial], name: str) -> dict[str, Any]:
    """A way's figure: the mean over seeds and test pictures, its interval over pictures, and the mean of each seed."""
    found = mean_interval(_over_seeds(trials, name))
    return {"score": found.score, "low": found.low, "high": found.high, "n": found.n, "seeds": _seeds(trials, name)}


def judge(claim: Claim, better: Sequence[Trial], worse: Sequence[Trial]) -> dict[str, Any]:
    """Whether a claim holds here.

    It holds, or does not, where the interval of the paired difference is on one side of 0 and every seed is on that
    side, too; all else cannot be told.
    """
    found = difference_interval(_over_seeds(better, claim.figure), _over_seeds(worse, claim.figure))
    seeds = [b - w for b, w in zip(_seeds(better, claim.figure), _seeds(worse, claim.figure), strict=True)]
    if not found.excludes(0):
        verdict = "cannot be told: the interval of the difference holds 0"
    elif any(np.sign(seed) != np.sign(found.score) for seed in seeds):
        verdict = "cannot be told: the seeds disagree"
    else:
        verdict = "holds" if (found.score < 0) == (claim.figure in LOWER) else "does not hold"
    return {
        "says": claim.says,
        "source": claim.source,
        "figure": claim.figure,
        "better": claim.better,
        "worse": claim.worse,
        "difference": found.score,
        "low": found.low,
        "high": found.high,
        "n": found.n,
        "seeds": seeds,
        "verdict": verdict,
        "sooner": _sooner(better, worse) if claim.figure == LOSS else None,
    }


def curve(trials: Sequence[Trial], name: str) -> list[Points]:
    """What validations measured over the steps, of each seed; empty where they do not measure it."""
    return [trial.curves[name] for trial in trials if name in trial.curves]


def _sooner(better: Sequence[Trial], worse: Sequence[Trial]) -> dict[str, Any]:
    """From which validation on one way's loss is at or below the other's last."""
    points, others = _mean_curve(better), _mean_curve(worse)
    last, level = others[-1]
    above = [step for step, loss in points if loss > level]
    steps = [step for step, _ in points if not above or step > max(above)]
    return {"level": level, "at": last, "from": steps[0] if steps else None, "first_looked_at": points[0][0]}


def _mean_curve(trials: Sequence[Trial]) -> Points:
    curves = curve(trials, "loss_right")
    return [(rows[0][0], float(np.mean([loss for _, loss in rows]))) for rows in zip(*curves, strict=True)]


def _over_seeds(trials: Sequence[Trial], name: str) -> np.ndarray:
    """Each picture's mean over the seeds: [n]."""
    return np.mean([trial.values[name] for trial in trials], axis=0)


def _seeds(trials: Sequence[Trial], name: str) -> list[float]:
    return [float(np.mean(trial.values[name])) for trial in trials]
