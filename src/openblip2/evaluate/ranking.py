"""Retrieval over large sets in bounded memory: the best candidates of each image and each text, re-ranked by ITM.

No matrix of all images and texts is ever held, and an image's features no longer than its candidates are scored.

Shapes: N images, M texts, K candidates, Q queries, E shared space, T text tokens, P patch tokens, V encoder width,
C pairs that ITM looks at.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openblip2.model.objectives import similarity
from openblip2.model.stage1 import Stage1

CHUNK = 64  # images or texts at once


@dataclass(frozen=True)
class Ranking:
    """The best K candidates of each of N rows, the best first: `places [N, K]` int64 and `scores [N, K]`."""

    places: Tensor
    scores: Tensor

    def by(self, scores: Tensor) -> "Ranking":
        """The same candidates in the order of other scores `[N, K]`."""
        found, order = scores.sort(dim=1, descending=True, stable=True)
        return Ranking(self.places.gather(1, order), found)


def best_texts(images: Tensor, texts: Tensor, k: int) -> Ranking:
    """The K texts nearest to each image by its best query's cosine: `images [N, Q, E]`, `texts [M, E]`."""
    return best_of((similarity(part, texts) for part in images.split(CHUNK)), k)


def best_images(images: Tensor, texts: Tensor, k: int) -> Ranking:
    """The K images nearest to each text: a ranking of M rows."""
    return best_of((similarity(images, part).T for part in texts.split(CHUNK)), k)


def best_of(parts: Iterable[Tensor], k: int) -> Ranking:
    """The K best columns of each row of a matrix that comes in parts, `[n, M]` each."""
    found = [part.topk(min(k, part.shape[1]), dim=1) for part in parts]
    return Ranking(torch.cat([top.indices for top in found]), torch.cat([top.values for top in found]))


def log_odds(logits: Tensor) -> Tensor:
    """How much likelier a match is than none: `[..., 2]` -> `[...]`."""
    return logits[..., 1] - logits[..., 0]


class Matches:
    """ITM's logits of the pairs that two rankings ask for, each pair once.

    Args:
        by_image: texts of each image.
        by_text: images of each text, of the same N and M.
    """

    def __init__(self, by_image: Ranking, by_text: Ranking) -> None:
        self.images, self.texts = len(by_image.places), len(by_text.places)
        place = by_image.places.device
        rows, columns = torch.arange(self.images, device=place), torch.arange(self.texts, device=place)
        codes = [self._codes(rows[:, None], by_image.places), self._codes(by_text.places, columns[:, None])]
        self.codes = torch.cat([part.flatten() for part in codes]).unique()  # [C], an image's pairs side by side
        self.logits = torch.zeros(len(self.codes), 2, device=place)

    def score(
        self,
        model: Stage1,
        features: Callable[[int], Tensor],
        tokens: Tensor,
        valid: Tensor,
        advance: Callable[[], object] = lambda: None,
    ) -> None:
        """Fills the logits, image by image: its keys and values are computed once, texts of like length go together.

        Args:
            features: image number -> `[1, P, V]`; asked once for each, in order.
            tokens, valid: `[M, T]`.
            advance: called after each image.
        """
        lengths = valid.sum(dim=1)
        bounds = torch.searchsorted(self.codes, torch.arange(self.images + 1, device=self.codes.device) * self.texts)
        for n, (first, last) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
            memory = model.qformer.encode_image(features(n))
            texts = self.codes[first:last] - n * self.texts
            for part in lengths[texts].argsort(stable=True).split(CHUNK):
                rows = texts[part]
                longest = int(lengths[rows[-1]])
                self.logits[first + part] = model.match(memory, tokens[rows, :longest], valid[rows, :longest]).float()
            advance()

    def of_images(self, ranking: Ranking) -> Tensor:
        """The logits of each image's candidates: `[N, K, 2]`."""
        rows = torch.arange(self.images, device=ranking.places.device)[:, None]
        return self.logits[torch.searchsorted(self.codes, self._codes(rows, ranking.places))]

    def of_texts(self, ranking: Ranking) -> Tensor:
        """The logits of each text's candidates: `[M, K, 2]`."""
        columns = torch.arange(self.texts, device=ranking.places.device)[:, None]
        return self.logits[torch.searchsorted(self.codes, self._codes(ranking.places, columns))]

    def _codes(self, images: Tensor, texts: Tensor) -> Tensor:
        return images * self.texts + texts


def hits_at(ranking: Ranking, accepted: Sequence[set[Hashable]], names: Sequence[Hashable], k: int) -> list[bool]:
    """Of each row, whether one of its best k candidates is accepted.

    Args:
        accepted: of each row, the names that count as right.
        names: of each candidate, by its number.
    """
    return [
        any(names[place] in right for place in places)
        for places, right in zip(ranking.places[:, :k].tolist(), accepted, strict=True)
    ]
