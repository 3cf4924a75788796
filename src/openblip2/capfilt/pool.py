"""The captions of one image, from the web and from the captioner: how many there are, their pool, and the best of it.

BLIP-2 (Li et al. 2023), section 3.4: ten captions are sampled and pooled with those from the web, and the two that are
most similar to the image are kept. BLIP (Li et al. 2022), section 3.3: one caption is sampled, and every text that does
not match the image according to image-text matching is dropped.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from openblip2.data.text import clean_caption
from openblip2.errors import UserError

Origin = Literal["web", "captioner"]


@dataclass(frozen=True)
class How:
    """Settings; the defaults are the paper's.

    Attributes:
        captions: number of captions to sample for each image.
        top_p: probability mass for nucleus sampling, in (0, 1].
        keep: number of captions to keep for each image, the best ones.
        filter: "similarity" ranks captions by their similarity to the image; "itm", as in BLIP, by the probability of
            a match, and drops those below `threshold`.
        threshold: in [0, 1].
        seed: of the sampled captions.

    Raises:
        UserError: a number is out of its range, or the filter is unknown.
    """

    captions: int = 10
    top_p: float = 0.9
    keep: int = 2
    filter: Literal["similarity", "itm"] = "similarity"
    threshold: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (("captions", self.captions, 1), ("keep", self.keep, 1), ("seed", self.seed, 0)):
            if value < least:
                raise UserError(f"--{name} {value}: it must be a whole number, {least} or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p}: it must be above 0 and at most 1, for example 0.9")
        if not 0 <= self.threshold <= 1:
            raise UserError(f"--threshold {self.threshold}: it must be a probability, from 0 to 1")
        if self.filter not in ("similarity", "itm"):
            raise UserError(f"--filter {self.filter}: it must be similarity or itm")


class Text(NamedTuple):
    """A cleaned caption and its origin."""

    text: str
    origin: Origin


def pool(web: Iterable[str], written: Iterable[str]) -> list[Text]:
    """The captions that differ after they are cleaned as for training, those from the web first."""
    texts = [Text(clean_caption(text), "web") for text in web]
    texts += (Text(clean_caption(text), "captioner") for text in written)
    different: dict[str, Text] = {}
    for text in texts:
        different.setdefault(text.text, text)  # the first of equal ones stays
    different.pop("", None)
    return list(different.values())


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
