"""The three objectives of stage 1 as pure functions of tensors (paper, section 3.1).

Shapes: B images, G images to compare with (G = B, or those of all processes: fast/joined_batch.py), Q queries,
E shared space, W vocabulary.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def same_image(ids: Tensor, others: Tensor | None = None) -> Tensor:
    """Which texts belong to which images: several captions of one image are positives of each other, never negatives.

    Args:
        ids: `[B]` int64, equal for captions of the same image.
        others: `[G]`, the ids of the texts; None = `ids`.

    Returns:
        `[B, G]` bool.
    """
    return ids[:, None] == (ids if others is None else others)[None, :]


def similarity(image: Tensor, text: Tensor, smooth_maximum: float = 0.0) -> Tensor:
    """Cosine similarity of images and texts: the maximum over the queries (paper), or a smooth maximum.

    The gradient of the maximum reaches only the best query, in our trials soon the same one for all images. The smooth
    maximum, `t * log(mean(exp(cosine / t)))`, has a gradient for all; the larger t is, the more of it for the others.

    Args:
        image: `[B, Q, E]`, normalised.
        text: `[G, E]`, normalised.
        smooth_maximum: t, in units of the cosine; 0 = the maximum.

    Returns:
        `[B, G]`.
    """
    with torch.autocast(image.device.type, enabled=False):  # bf16 would lose the order of close candidates
        cosines = torch.einsum("bqe,ne->bqn", image.float(), text.float())
        if not smooth_maximum:
            return cosines.amax(dim=1)
        return smooth_maximum * ((cosines / smooth_maximum).logsumexp(dim=1) - math.log(cosines.shape[1]))


class Contrast(NamedTuple):
    """The ITC loss, and the similarities divided by the temperature, from which hard negatives are drawn."""

    loss: Tensor
    image_to_text: Tensor  # [B, G]
    text_to_image: Tensor  # [B, G]


def contrastive(
    image: Tensor,
    text: Tensor,
    temperature: Tensor,
    positives: Tensor,
    label_smoothing: float = 0.1,
    detach_gathered: bool = False,
    transpose: Callable[[Tensor], Tensor] = torch.t,
    smooth_maximum: float = 0.0,
) -> Contrast:
    """Image-text contrastive loss: each image finds its texts among all texts, and each text its images.

    Args:
        image: `[B, Q, E]`, normalised.
        text: `[G, E]`, normalised.
        temperature: scalar.
        positives: `[B, G]` from `same_image`; a row's positives share its target equally.
        label_smoothing: share of each target that is spread evenly over all `G`.
        detach_gathered: True = as in the authors' code, which gathers the other side from all processes without
            gradient, so each direction trains only one side. False (ours) = the gradient of the whole batch.
        transpose: a function from our rows of a `[G, G]` matrix to our rows of its transpose, both `[B, G]`.
        smooth_maximum: see `similarity`.
    """
    image_to_text = similarity(image, text.detach() if detach_gathered else text, smooth_maximum) / temperature
    from_text = image_to_text
    if detach_gathered:
        from_text = similarity(image.detach(), text, smooth_maximum) / temperature
    text_to_image = transpose(from_text)  # [B, G]: our texts against all images
    portion = positives.float() / positives.sum(dim=1, keepdim=True)  # never 0: each pair is its own positive
    targets = (1 - label_smoothing) * portion + label_smoothing / positives.shape[1]
    loss = (F.cross_entropy(image_to_text.float(), targets) + F.cross_entropy(text_to_image.float(), targets)) / 2
    return Contrast(loss, image_to_text, text_to_image)


class HardNegatives(NamedTuple):
    """Hard negatives as indices into the batch; -1 if a row has none, because everything in the batch matches it."""

    texts: Tensor  # [B] int64: for each image, a text that is not its own
    images: Tensor  # [B] int64: for each text, an image that is not its own


def hard_negatives(
    image_to_text: Tensor, text_to_image: Tensor, positives: Tensor, draws: Tensor | None = None
) -> HardNegatives:
    """Draws a negative text for each image and a negative image for each text, from the softmax of the similarities.

    Positives are masked out *before* the softmax, so that rounding cannot make one of them possible. There is no
    gradient.

    Args:
        image_to_text: `[B, G]`.
        text_to_image: `[B, G]`.
        positives: `[B, G]` bool.
        draws: `[2, B]` fp64, uniform in [0, 1), for texts and for images; None = from torch's generator.
    """
    if draws is None:
        draws = torch.rand(2, len(positives), dtype=torch.float64)  # as precise as the sums below
    of_image, of_text = draws.to(positives.device)
    return HardNegatives(
        _draw(image_to_text.detach(), positives, of_image), _draw(text_to_image.detach(), positives, of_text)
    )


def _draw(scores: Tensor, positives: Tensor, draws: Tensor) -> Tensor:
    has_negative = ~positives.all(dim=1)  # False if all captions in the batch are of one image
    weights = scores.double().masked_fill(positives, -torch.inf)  # their probability is exactly 0
    # A row with only -inf would become NaN, so it gets an arbitrary distribution, and -1 replaces its draw below.
    summed = weights.masked_fill(~has_negative[:, None], 0.0).softmax(dim=1).cumsum(dim=1)
    # The first index whose sum exceeds the draw. It is never a positive, because positives add nothing to the sum.
    # For any draw < 1 the product rounds to less than the last sum.
    found = torch.searchsorted(summed, draws[:, None] * summed[:, -1:], right=True)[:, 0]
    # The index is out of range if similarities are NaN: then the loss is NaN, too, and training skips the step.
    return found.clamp(max=summed.shape[1] - 1).where(has_negative, -1)


def matching(logits: Tensor, is_match: Tensor) -> Tensor:
    """Image-text matching loss: `logits [N, 2]` (class 1 = match), `is_match [N]` bool.

    With one match for every two mismatches, chance level is 0.6365: if the loss stays there, nothing was learned.
    """
    return F.cross_entropy(logits.float(), is_match.long())  # "two-class linear classifier" (3.1)


def generation(logits: Tensor, targets: Tensor, label_smoothing: float = 0.1) -> Tensor:
    """Image-grounded text generation loss: word logits `[N, W]` at the `N` positions with a target, `targets [N]`."""
    return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)


def decorrelation(queries: Tensor, mean: Tensor | None = None) -> Tensor:
    """How much the outputs of a picture's queries collapse to one vector, apart from what all pictures share.

    Not in the paper. ITC, ITM and ITG can be low when each query encodes the whole picture, and then all queries become
    one vector. Each query's mean over the batch is subtracted first, without a gradient, because outputs that differ
    only by a constant contain the same information about a picture. The measure is the participation ratio of the
    squared singular values: it is similar to `effective_rank`, but needs no singular value decomposition.

    Args:
        queries: `[B, Q, D]`, query outputs.
        mean: `[Q, D]`, over the whole batch; None = over these B.

    Returns:
        A scalar in [0, 1]: 1 if the queries of each picture are multiples of one vector, 0 if they are orthogonal and
        of equal length, or if there is only one query.
    """
    rows = queries.float() - (queries.detach().float().mean(dim=0) if mean is None else mean)
    count, gram = rows.shape[1], rows @ rows.mT  # [B, Q, Q]; its eigenvalues are the squared singular values
    total = gram.diagonal(dim1=1, dim2=2).sum(dim=1).square()  # (sum of squared singular values)^2
    share = torch.where(total > 0, gram.square().sum(dim=(1, 2)) / total.clamp(min=1e-30), 1 / count)  # 1/Q to 1
    return ((share * count - 1) / max(1, count - 1)).mean()  # from [1/Q, 1] to [0, 1]
