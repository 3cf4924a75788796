"""The pool of captions of one image, from the web and from the captioner, without duplicates.

BLIP-2 (Li et al. 2023), section 3.4: ten captions are sampled and pooled with those from the web, and the two that are
most similar to the image are kept. BLIP (Li et al. 2022), section 3.3: one caption is sampled, and every text that does
not match the image according to image-text matching is dropped.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from openblip2.data.text import clean_caption
from openblip2.errors import UserError

Origin = Literal["web", "captioner"]


class Text(NamedTuple):
    """A cleaned caption and its origin."""

    text: str
    origin: Origin


class Pool(NamedTuple):
    """The different captions of an image, and the numbers of duplicates and of empty captions that were left out."""

    texts: tuple[Text, ...]
    folded: int
    empty: int


def pool(web: Iterable[str], written: Iterable[str]) -> Pool:
    """The captions that differ after they are cleaned as for training, those from the web first."""
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
    """The numbers of the captions to keep, the best first; of equal ones the earlier.

    Args:
        scores: of all captions.
        keep: how many to keep at most.
        threshold: captions with a lower score are dropped.

    Raises:
        UserError: a score is not a number.
    """
    if not all(map(math.isfinite, scores)):
        raise UserError("the ranker gives scores that are not numbers: are its weights complete?")
    left = [n for n, score in enumerate(scores) if threshold is None or score >= threshold]
    return sorted(left, key=lambda n: -scores[n])[:keep]
