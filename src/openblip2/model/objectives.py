"""The three objectives of stage 1 as pure functions of tensors (paper, section 3.1).

Shapes: B images here, G images over all processes (G = B in one process), Q queries, E shared space, W vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from openblip2.distributed import gather


def same_image(ids: Tensor) -> Tensor:
    """Which of all texts belong to which of our images: `ids [B]` int64 -> `[B, G]` bool.

    Several captions of one image in a batch are positives of each other, never negatives.
    """
    return ids[:, None] == gather(ids)[None, :]


def similarity(image: Tensor, text: Tensor) -> Tensor:
    """The best query's cosine for each image and text: `[B, Q, E]`, `[N, E]`, both normalised -> `[B, N]`."""
    with torch.autocast(image.device.type, enabled=False):  # bf16 would round away the order of near candidates
        return torch.einsum("bqe,ne->bqn", image.float(), text.float()).amax(dim=1)


class Contrast(NamedTuple):
    """ITC and the temperature-scaled similarities it came from, from which hard negatives are drawn."""

    loss: Tensor
    image_to_text: Tensor  # [B, G]
    text_to_image: Tensor  # [B, G]


def contrastive(
    image: Tensor,
    text: Tensor,
    temperature: Tensor,
    positives: Tensor,
    label_smoothing: float = 0.1,
    one_sided: bool = False,
) -> Contrast:
    """Image-text contrastive loss: each image finds its texts among all texts, and each text its images.

    Args:
        image: `[B, Q, E]`, normalised. text: `[B, E]`, normalised. temperature: scalar.
        positives: `[B, G]` from `same_image`; a row's positives share its target equally.
        label_smoothing: share of each target spread evenly over all `G`.
        one_sided: the authors' code: what was gathered carries no gradient, so each of the two directions trains
            one side only. False (ours) gives the gradient of the joined batch, whatever the number of processes.
    """
    all_texts, all_images = gather(text), gather(image)
    if one_sided:
        all_texts, all_images = all_texts.detach(), all_images.detach()
    image_to_text = similarity(image, all_texts) / temperature
    text_to_image = similarity(all_images, text).T / temperature
    share = positives.float() / positives.sum(dim=1, keepdim=True)
    targets = (1 - label_smoothing) * share + label_smoothing / positives.shape[1]
    loss = (F.cross_entropy(image_to_text.float(), targets) + F.cross_entropy(text_to_image.float(), targets)) / 2
    return Contrast(loss, image_to_text, text_to_image)


class Rivals(NamedTuple):
    """Hard negatives; -1 where a row has none, because everything in the batch matches it."""

    texts: Tensor  # [B] int64: for each image, a text that is not its own
    images: Tensor  # [B] int64: for each text, an image that is not its own


def hard_negatives(image_to_text: Tensor, text_to_image: Tensor, positives: Tensor) -> Rivals:
    """One negative text for each image and one negative image for each text, the more similar the likelier.

    Drawn from the softmax of the similarities `[B, G]` with positives masked out *before* the softmax, so that no
    rounding can bring one back. No gradient.
    """
    return Rivals(_draw(image_to_text.detach(), positives), _draw(text_to_image.detach(), positives))


def _draw(scores: Tensor, positives: Tensor) -> Tensor:
    has_rival = ~positives.all(dim=1)
    weights = scores.float().masked_fill(positives, -torch.inf)
    # A row of -inf alone would become NaN: give it any distribution, and mark what is drawn from it as no rival.
    weights = weights.masked_fill(~has_rival[:, None], 0.0).softmax(dim=1)
    return torch.multinomial(weights, 1)[:, 0].where(has_rival, -1)


def matching(logits: Tensor, is_match: Tensor) -> Tensor:
    """Image-text matching loss: `logits [N, 2]` (class 1 = match), `is_match [N]` bool.

    With one true pair to two false ones chance is 0.6365: a loss that stays there has learned nothing.
    """
    return F.cross_entropy(logits.float(), is_match.long())


def generation(logits: Tensor, targets: Tensor, label_smoothing: float = 0.1) -> Tensor:
    """Image-grounded text generation loss: word logits `[N, W]` at the `N` positions with a target, `targets [N]`."""
    return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)
