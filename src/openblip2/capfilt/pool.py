"""The captions of one picture: those it has, and those that are written for it. Each stands there once.

BLIP-2 (Li et al. 2023), section 3.4: ten captions are sampled, pooled with the web's, and the two are kept that
are most like the picture. BLIP (Li et al. 2022), section 3.3: one is sampled, and a filter drops every text, the
web's or the sampled, that image-text matching finds not to belong to the picture.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from openblip2.data.text import clean_caption
from openblip2.errors import UserError

Origin = Literal["web", "captioner"]


class Text(NamedTuple):
    """A caption, cleaned, and who wrote it."""

    text: str
    origin: Origin


class Pool(NamedTuple):
    """The different captions of a picture, and how many were left out as being there already, or empty."""

    texts: tuple[Text, ...]
    folded: int
    empty: int


def pool(web: Iterable[str], written: Iterable[str]) -> Pool:
    """The captions that differ once they are cleaned as for training, in their order, the web's first."""
    found: dict[str, Origin] = {}
    folded = empty = 0
    given: tuple[tuple[Origin, Iterable[str]], ...] = (("web", web), ("captioner", written))
    for origin, texts in given:
        for text in map(clean_caption, texts):
            if not text:
                empty += 1
            elif text in found:
                folded += 1
            else:
                found[text] = origin
    return Pool(tuple(Text(*one) for one in found.items()), folded, empty)


def best(scores: Sequence[float], keep: int, threshold: float | None = None) -> list[int]:
    """Which captions are kept, the best first; of equal ones the earlier.

    Args:
        threshold: what is below is dropped; then fewer than `keep` may be left, or none.

    Raises:
        UserError: a score is no number.
    """
    if not all(map(math.isfinite, scores)):
        raise UserError("the ranker gives scores that are no numbers: are its weights whole?")
    left = [n for n, score in enumerate(scores) if threshold is None or score >= threshold]
    return sorted(left, key=lambda n: -scores[n])[:keep]
