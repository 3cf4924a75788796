"""Between what a loss can lie: chance, which a model reaches that knows nothing, and the floor, below which none comes.

All in nats.
"""

import math

ITM_CHANCE = math.log(3) - 2 / 3 * math.log(2)  # 0.6365: one match in three pairs, without looking
ITM_ACCURACY_CHANCE = 2 / 3  # by saying "no match" each time


def itc_chance(batch: int) -> float:
    """Every text of the batch is as likely as any other."""
    return math.log(batch)


def smoothed_floor(smoothing: float, choices: int) -> float:
    """The entropy of a smoothed target, which even a perfect model has as its loss; 0 without smoothing.

    The right one of `choices` has 1 - smoothing, and all share the smoothing evenly.
    """
    if smoothing == 0 or choices < 2:
        return 0.0
    rest = smoothing / choices
    right = 1 - smoothing + rest
    return -right * math.log(right) - (choices - 1) * rest * math.log(rest)


def word_chance(vocabulary: int) -> float:
    """Every word is as likely as any other."""
    return math.log(vocabulary)
