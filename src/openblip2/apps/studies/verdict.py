"""The figures of a study with intervals, and whether its claims hold, computed from the trials.

Two sources of chance are kept apart: which images are tested (95 % intervals, bootstrap over test images, paired if two
ways are compared), and the seed of training (the figure of each seed).
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from openblip2.apps.studies.design import LOSS, LOWER, Claim
from openblip2.apps.studies.trial import Points, Trial
from openblip2.evaluate.intervals import difference_interval, mean_interval


def figure(trials: Sequence[Trial], name: str) -> dict[str, Any]:
    """A figure of a way: the mean over seeds and test images, its interval over images, and the mean of each seed."""
    return {**mean_interval(_over_seeds(trials, name)).as_json(), "seeds": _seeds(trials, name)}


def judge(claim: Claim, better: Sequence[Trial], worse: Sequence[Trial]) -> dict[str, Any]:
    """Whether a claim holds here.

    It is decided only if the interval of the paired difference and the difference of every seed are on the same side
    of 0.
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
        **asdict(claim),
        "difference": found.score,
        "low": found.low,
        "high": found.high,
        "n": found.n,
        "seeds": seeds,
        "verdict": verdict,
        "sooner": _sooner(better, worse) if claim.figure == LOSS else None,
    }


def curve(trials: Sequence[Trial], name: str) -> list[Points]:
    """The values of the validations over the steps, for each seed that has them."""
    return [trial.curves[name] for trial in trials if name in trial.curves]


def _sooner(better: Sequence[Trial], worse: Sequence[Trial]) -> dict[str, Any]:
    """The first validation after which the loss of one way stays at or below the last of the other."""
    points, others = _mean_curve(better), _mean_curve(worse)
    last, level = others[-1]
    above = [step for step, loss in points if loss > level]
    steps = [step for step, _ in points if not above or step > max(above)]
    return {"level": level, "at": last, "from": steps[0] if steps else None, "first_looked_at": points[0][0]}


def _mean_curve(trials: Sequence[Trial]) -> Points:
    curves = curve(trials, "loss_right")
    return [(rows[0][0], float(np.mean([loss for _, loss in rows]))) for rows in zip(*curves, strict=True)]


def _over_seeds(trials: Sequence[Trial], name: str) -> np.ndarray:
    """The mean over seeds for each image: [n]."""
    return np.mean([trial.values[name] for trial in trials], axis=0)


def _seeds(trials: Sequence[Trial], name: str) -> list[float]:
    return [float(np.mean(trial.values[name])) for trial in trials]
