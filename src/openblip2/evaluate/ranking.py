"""Image-text retrieval (paper, section 4.4): candidates by ITC, then re-ranked by ITM, and how many of them are right.

`best_texts`, `best_images` and `Matches` use bounded memory, for large data sets: no matrix of all images and texts is
held, and an image's features only until its candidates are scored. `similarities`, `rerank` and `recalls` do the same
with whole matrices, for small sets.

Shapes: N images, M texts, K candidates, Q queries, E shared space, T text tokens, P patch tokens, V encoder width,
C pairs that ITM scores.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openblip2.model.objectives import similarity
from openblip2.model.stage1 import Stage1

CHUNK = 64  # images, texts or pairs at once


@dataclass(frozen=True)
class Ranking:
    """The best K candidates of each of N rows, the best first: `indices [N, K]` int64 and `scores [N, K]`."""

    indices: Tensor
    scores: Tensor

    def by(self, scores: Tensor) -> "Ranking":
        """The same candidates in the order of other scores `[N, K]`."""
        in_order, order = scores.sort(dim=1, descending=True, stable=True)
        return Ranking(self.indices.gather(1, order), in_order)

    def first(self, k: int) -> "Ranking":
        """The best k candidates alone."""
        return Ranking(self.indices[:, :k], self.scores[:, :k])

    def first_right(self, is_right: Callable[[int, int], bool]) -> list[int | None]:
        """Of each row, the rank of the first candidate for which `is_right(row, candidate)`, from 1; None = none."""
        return [
            next((rank for rank, column in enumerate(columns, 1) if is_right(row, column)), None)
            for row, columns in enumerate(self.indices.tolist())
        ]


def image_vectors(model: Stage1, features: Tensor) -> Tensor:
    """The queries of all images in the shared space: `features [N, P, V]` -> `[N, Q, E]`."""
    parts = [model.image_vectors(model.connector.query_output(part)) for part in features.split(CHUNK)]
    return torch.cat(parts)


def text_vectors(model: Stage1, tokens: Tensor, valid: Tensor) -> Tensor:
    """All texts in the shared space: `[M, T]` -> `[M, E]`."""
    pairs = zip(tokens.split(CHUNK), valid.split(CHUNK), strict=True)
    return torch.cat([model.text_vectors(part, real) for part, real in pairs])


def similarities(model: Stage1, features: Tensor, tokens: Tensor, valid: Tensor) -> Tensor:
    """The best query's cosine for all images and texts: `[N, M]`."""
    texts = text_vectors(model, tokens, valid)
    return torch.cat([similarity(part, texts) for part in image_vectors(model, features).split(CHUNK)])


def best_texts(images: Tensor, texts: Tensor, k: int) -> Ranking:
    """The K texts nearest to each image by its best query's cosine: `images [N, Q, E]`, `texts [M, E]`."""
    return _best_of((similarity(part, texts) for part in images.split(CHUNK)), k)


def best_images(images: Tensor, texts: Tensor, k: int) -> Ranking:
    """The K images nearest to each text: a ranking of M rows."""
    return _best_of((similarity(images, part).T for part in texts.split(CHUNK)), k)


def _best_of(parts: Iterable[Tensor], k: int) -> Ranking:
    """The K best columns of each row of a matrix that comes in parts, `[n, M]` each."""
    tops = [part.topk(min(k, part.shape[1]), dim=1) for part in parts]
    return Ranking(torch.cat([top.indices for top in tops]), torch.cat([top.values for top in tops]))


def log_odds(logits: Tensor) -> Tensor:
    """The log-odds of a match: `[..., 2]` -> `[...]`."""
    return logits[..., 1] - logits[..., 0]


class Matches:
    """ITM's logits of the pairs in two rankings, each pair computed once.

    Args:
        by_image: texts of each image.
        by_text: images of each text, of the same N and M.
    """

    def __init__(self, by_image: Ranking, by_text: Ranking) -> None:
        self.images, self.texts = len(by_image.indices), len(by_text.indices)
        self.codes = torch.cat([self._of_images(by_image).flatten(), self._of_texts(by_text).flatten()]).unique()
        # [C], image * M + text of each pair: the pairs of an image are next to each other
        self.logits = torch.zeros(len(self.codes), 2, device=self.codes.device)

    def score(
        self,
        model: Stage1,
        features: Callable[[int], Tensor],
        tokens: Tensor,
        valid: Tensor,
        advance: Callable[[], object] = lambda: None,
    ) -> None:
        """Computes the logits, image by image.

        The keys and values of an image are computed once, and texts of similar length go together.

        Args:
            features: image number -> `[1, P, V]`; called once for each, in order.
            tokens: `[M, T]`.
            valid: `[M, T]`, which tokens are no padding.
            advance: called after each image.
        """
        lengths = valid.sum(dim=1)
        bounds = torch.searchsorted(self.codes, torch.arange(self.images + 1, device=self.codes.device) * self.texts)
        for n, (first, last) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
            memory = model.connector.encode_image(features(n))
            texts = self.codes[first:last] - n * self.texts
            for part in lengths[texts].argsort(stable=True).split(CHUNK):
                rows = texts[part]
                longest = int(lengths[rows[-1]])
                self.logits[first + part] = model.match(memory, tokens[rows, :longest], valid[rows, :longest]).float()
            advance()

    def of_images(self, ranking: Ranking) -> Tensor:
        """The logits of each image's candidates: `[N, K, 2]`."""
        return self.logits[torch.searchsorted(self.codes, self._of_images(ranking))]

    def of_texts(self, ranking: Ranking) -> Tensor:
        """The logits of each text's candidates: `[M, K, 2]`."""
        return self.logits[torch.searchsorted(self.codes, self._of_texts(ranking))]

    def _of_images(self, ranking: Ranking) -> Tensor:
        """The code of each pair of a ranking of images, `[N, K]`."""
        return torch.arange(self.images, device=ranking.indices.device)[:, None] * self.texts + ranking.indices

    def _of_texts(self, ranking: Ranking) -> Tensor:
        return ranking.indices * self.texts + torch.arange(self.texts, device=ranking.indices.device)[:, None]


def rerank(
    model: Stage1,
    features: Tensor,
    tokens: Tensor,
    valid: Tensor,
    scores: Tensor,
    best: int,
    advance: Callable[[], object] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Scores in which the best candidates are in ITM's order, for both directions: two `[N, M]`.

    For each image its `best` texts by `scores [N, M]`, and for each text its `best` images, are given the log-odds
    of the ITM head. All others are ranked after them in their old order. `advance` is called after each image.
    """
    texts, images = _best_of([scores], best), _best_of([scores.T], best)
    matches = Matches(texts, images)
    matches.score(model, lambda n: features[n : n + 1], tokens, valid, advance)
    odds = log_odds(matches.logits).to(scores.dtype)
    others = scores - scores.max() + odds.min() - 1
    by_image = others.scatter(1, texts.indices, log_odds(matches.of_images(texts)).to(scores.dtype))
    by_text = others.T.scatter(1, images.indices, log_odds(matches.of_texts(images)).to(scores.dtype)).T
    return by_image, by_text


def recalls(scores_by_image: Tensor, scores_by_text: Tensor, correct: Tensor, ks: Sequence[int] = (1, 5)) -> dict:
    """Shares of images (`tr@k`) and texts (`ir@k`) with a correct partner among the best k, in [0, 1].

    Args:
        scores_by_image: `[N, M]`.
        scores_by_text: `[N, M]`, the same matrix unless it is re-ranked.
        correct: `[N, M]` bool, every pair that counts as right.
        ks: numbers of candidates.
    """
    found = {}
    for k in ks:
        for way, scores, right in (("tr", scores_by_image, correct), ("ir", scores_by_text.T, correct.T)):
            best = scores.topk(min(k, scores.shape[1]), dim=1).indices
            found[f"{way}@{k}"] = right.gather(1, best).any(dim=1).float().mean().item()
    return found
