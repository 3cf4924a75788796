"""Image-text retrieval (paper, section 4.4): finds candidates by ITC, re-ranks them by ITM, and measures recall.

`best_texts`, `best_images` and `match_candidates` use bounded memory, for large data sets: they store no matrix of all
images and texts, and keep the features of an image only until its candidates are scored. `similarities`, `rerank` and
`recalls` do the same with whole matrices, for small sets.

Shapes: N images, M texts, K candidates, Q queries, E shared space, T text tokens, P patch tokens, V encoder width.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openblip2.model.objectives import similarity
from openblip2.model.stage1 import Stage1

CHUNK = 64  # images, texts or pairs per batch


@dataclass(frozen=True)
class Ranking:
    """The best K candidates of each of N rows, the best first: `indices [N, K]` int64 and `scores [N, K]`."""

    indices: Tensor
    scores: Tensor

    def by(self, scores: Tensor) -> "Ranking":
        """The same candidates, sorted by other scores `[N, K]`."""
        in_order, order = scores.sort(dim=1, descending=True, stable=True)
        return Ranking(self.indices.gather(1, order), in_order)

    def first_right(self, is_right: Callable[[int, int], bool]) -> list[int | None]:
        """For each row, the rank (from 1) of the first candidate with `is_right(row, candidate)`; None = none."""
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
    """Cosine similarity of all images and texts, the maximum over the queries: `[N, M]`."""
    texts = text_vectors(model, tokens, valid)
    return torch.cat([similarity(part, texts) for part in image_vectors(model, features).split(CHUNK)])


def best_texts(images: Tensor, texts: Tensor, k: int) -> Ranking:
    """The K texts most similar to each image, by the maximum over queries: `images [N, Q, E]`, `texts [M, E]`."""
    return _best_of((similarity(part, texts) for part in images.split(CHUNK)), k)


def best_images(images: Tensor, texts: Tensor, k: int) -> Ranking:
    """The K images most similar to each text: a ranking of M rows."""
    return _best_of((similarity(images, part).T for part in texts.split(CHUNK)), k)


def _best_of(parts: Iterable[Tensor], k: int) -> Ranking:
    """The K best columns of each row of a matrix that is given in parts of shape `[n, M]`."""
    tops = [part.topk(min(k, part.shape[1]), dim=1) for part in parts]
    return Ranking(torch.cat([top.indices for top in tops]), torch.cat([top.values for top in tops]))


def log_odds(logits: Tensor) -> Tensor:
    """The log-odds of a match: `[..., 2]` -> `[...]`."""
    return logits[..., 1] - logits[..., 0]


def match_candidates(
    model: Stage1,
    features: Callable[[int], Tensor],
    tokens: Tensor,
    valid: Tensor,
    by_image: Ranking,
    by_text: Ranking,
    advance: Callable[[], object] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """ITM logits for the texts of each image, `[N, K, 2]`, and for the images of each text, `[M, K, 2]`.

    A pair that is in both rankings is computed once. The keys and values of an image are computed once, and texts of
    similar length are batched together.

    Args:
        features: image number -> `[1, P, V]`; called once for each image, in order.
        tokens: `[M, T]`.
        valid: `[M, T]`, True for tokens that are not padding.
        by_image: candidate texts of each image.
        by_text: candidate images of each text, for the same N images and M texts.
        advance: called after each image.
    """
    lengths, (count, own) = valid.sum(dim=1), by_image.indices.shape
    images = by_text.indices.flatten()  # [M * K]
    order = images.argsort()  # the positions in `images` of image 0, then those of image 1, ...
    bounds = torch.searchsorted(images[order], torch.arange(count + 1, device=images.device)).tolist()
    of_images = torch.zeros(count, own, 2, device=images.device)
    of_texts = torch.zeros(len(images), 2, device=images.device)
    for n in range(count):
        memory = model.connector.encode_image(features(n))
        places = order[bounds[n] : bounds[n + 1]]
        pairs = torch.cat([by_image.indices[n], places // by_text.indices.shape[1]])
        texts, number = pairs.unique(return_inverse=True)
        logits = torch.zeros(len(texts), 2, device=images.device)
        for part in lengths[texts].argsort(stable=True).split(CHUNK):
            rows = texts[part]
            longest = int(lengths[rows[-1]])
            logits[part] = model.match(memory, tokens[rows, :longest], valid[rows, :longest]).float()
        of_images[n], of_texts[places] = logits[number[:own]], logits[number[own:]]
        advance()
    return of_images, of_texts.unflatten(0, by_text.indices.shape)


def rerank(
    model: Stage1,
    features: Tensor,
    tokens: Tensor,
    valid: Tensor,
    scores: Tensor,
    best: int,
    advance: Callable[[], object] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Re-ranks the best candidates by ITM, for both directions; returns two score matrices `[N, M]`.

    For each image, the `best` texts by `scores [N, M]` get the log-odds of the ITM head; for each text, the `best`
    images get them. All others are ranked after them in their old order. `advance` is called after each image.
    """
    texts, images = _best_of([scores], best), _best_of([scores.T], best)
    matches = match_candidates(model, lambda n: features[n : n + 1], tokens, valid, texts, images, advance)
    of_images, of_texts = (log_odds(logits).to(scores.dtype) for logits in matches)
    others = scores - scores.max() + torch.minimum(of_images.min(), of_texts.min()) - 1
    return others.scatter(1, texts.indices, of_images), others.T.scatter(1, images.indices, of_texts).T


def recalls(scores_by_image: Tensor, scores_by_text: Tensor, correct: Tensor, ks: Sequence[int] = (1, 5)) -> dict:
    """Recall@k: fractions of images (`tr@k`) and texts (`ir@k`) with a correct partner among the best k, in [0, 1].

    Args:
        scores_by_image: `[N, M]`.
        scores_by_text: `[N, M]`, the same matrix unless it is re-ranked.
        correct: `[N, M]` bool, True for every pair that counts as right.
        ks: the values of k.
    """
    found = {}
    for k in ks:
        for way, scores, right in (("tr", scores_by_image, correct), ("ir", scores_by_text.T, correct.T)):
            best = scores.topk(min(k, scores.shape[1]), dim=1).indices
            found[f"{way}@{k}"] = right.gather(1, best).any(dim=1).float().mean().item()
    return found
