"""Image-text retrieval (paper, section 4.4): recall of ITC alone, and after ITM has re-ranked its best candidates.

Shapes: N images, M texts, Q queries, E shared space, T text tokens, P patch tokens, V encoder width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from openblip2.evaluate.ranking import Matches, best_of, log_odds
from openblip2.model.objectives import similarity
from openblip2.model.stage1 import Stage1

CHUNK = 64  # images, texts or pairs at once


def image_vectors(model: Stage1, features: Tensor) -> Tensor:
    """Query directions of all images: `features [N, P, V]` -> `[N, Q, E]`."""
    parts = [model.image_vectors(model.qformer.query_output(part)) for part in features.split(CHUNK)]
    return torch.cat(parts)


def text_vectors(model: Stage1, tokens: Tensor, valid: Tensor) -> Tensor:
    """Text directions: `[M, T]` -> `[M, E]`."""
    pairs = zip(tokens.split(CHUNK), valid.split(CHUNK), strict=True)
    return torch.cat([model.text_vectors(part, real) for part, real in pairs])


def similarities(model: Stage1, features: Tensor, tokens: Tensor, valid: Tensor) -> Tensor:
    """Best query's cosine for all images and texts: `[N, M]`."""
    texts = text_vectors(model, tokens, valid)
    return torch.cat([similarity(part, texts) for part in image_vectors(model, features).split(CHUNK)])


def rerank(
    model: Stage1,
    features: Tensor,
    tokens: Tensor,
    valid: Tensor,
    scores: Tensor,
    best: int,
    advance: Callable[[], object] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Scores in which the best candidates stand in ITM's order, for both directions: two `[N, M]`.

    For each image its `best` texts by `scores [N, M]`, and for each text its `best` images, are given the log-odds
    of the ITM head; all others rank behind them in their old order. An image's keys and values are computed once and
    shared by its texts, and texts of like length go together. `advance` is called after each image.
    """
    texts, images = best_of([scores], best), best_of([scores.T], best)
    matches = Matches(texts, images)
    matches.score(model, lambda n: features[n : n + 1], tokens, valid, advance)
    odds = log_odds(matches.logits).to(scores.dtype)
    behind = scores - scores.max() + odds.min() - 1
    by_image = behind.scatter(1, texts.places, log_odds(matches.of_images(texts)).to(scores.dtype))
    by_text = behind.T.scatter(1, images.places, log_odds(matches.of_texts(images)).to(scores.dtype)).T
    return by_image, by_text


def recalls(scores_by_image: Tensor, scores_by_text: Tensor, correct: Tensor, ks: Sequence[int] = (1, 5)) -> dict:
    """Shares of images (`tr@k`) and texts (`ir@k`) with a correct partner among the best k, in [0, 1].

    Args:
        scores_by_image, scores_by_text: `[N, M]`, the same matrix unless re-ranked.
        correct: `[N, M]` bool, every pair that counts as right.
    """
    found = {}
    for k in ks:
        found[f"tr@{k}"] = _hits(scores_by_image, correct, k)
        found[f"ir@{k}"] = _hits(scores_by_text.T, correct.T, k)
    return found


def _hits(scores: Tensor, correct: Tensor, k: int) -> float:
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return correct.gather(1, best).any(dim=1).float().mean().item()
