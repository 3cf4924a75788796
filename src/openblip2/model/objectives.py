"""The three objectives of stage 1 as pure functions of tensors (paper, section 3.1).

Shapes: B images here, G images over all processes (G = B in one process), Q queries, E shared space, W vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from openblip2.distributed import Share, gather, share, transpose


def same_image(ids: Tensor, shared: Share | None = None) -> Tensor:
    """Which of all texts belong to which of our images: `ids [B]` int64 -> `[B, G]` bool.

    Several captions of one image in a batch are positives of each other, never negatives. `shared`: whose rows are
    whose; None = asked of the processes.
    """
    return ids[:, None] == gather(ids, share(len(ids)) if shared is None else shared)[None, :]


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
    shared: Share | None = None,
) -> Contrast:
    """Image-text contrastive loss: each image finds its texts among all texts, and each text its images.

    In several processes its mean over them is the loss of the joined batch.

    Args:
        image: `[B, Q, E]`, normalised. text: `[B, E]`, normalised. temperature: scalar.
        positives: `[B, G]` from `same_image`; a row's positives share its target equally.
        label_smoothing: share of each target spread evenly over all `G`.
        one_sided: the authors' code: what was gathered carries no gradient, so each of the two directions trains
            one side only. False (ours) gives the gradient of the joined batch, whatever the number of processes.
        shared: whose rows are whose; None = asked of the processes.
    """
    shared = share(len(image)) if shared is None else shared
    texts = gather(text, shared)
    image_to_text = similarity(image, texts.detach() if one_sided else texts) / temperature
    # What our texts are to the images of others has been computed there.
    from_text = similarity(image.detach(), texts) / temperature if one_sided else image_to_text
    text_to_image = transpose(from_text, shared)
    portion = positives.float() / positives.sum(dim=1, keepdim=True)
    targets = (1 - label_smoothing) * portion + label_smoothing / positives.shape[1]
    loss = (F.cross_entropy(image_to_text.float(), targets) + F.cross_entropy(text_to_image.float(), targets)) / 2
    return Contrast(shared.weigh(loss, len(image), shared.total), image_to_text, text_to_image)


def sigmoid_contrastive(
    image: Tensor,
    text: Tensor,
    temperature: Tensor,
    bias: Tensor,
    positives: Tensor,
    shared: Share | None = None,
) -> Contrast:
    """SigLIP's contrastive loss (Zhai et al. 2023), not the paper's: every pair for itself, is it a match or not?

    Summed over an image's `G` texts, mean over images. A pair's logit is its similarity over the temperature, plus a
    bias that starts low, for nearly all pairs are no match. One pass over all pairs trains both sides: no directions.

    Args:
        image: `[B, Q, E]`, normalised. text: `[B, E]`, normalised. temperature, bias: scalars.
        positives: `[B, G]` from `same_image`; each of a row's positives counts in full.
        shared: whose rows are whose; None = asked of the processes.
    """
    shared = share(len(image)) if shared is None else shared
    image_to_text = similarity(image, gather(text, shared)) / temperature
    signs = positives.float() * 2 - 1
    loss = -F.logsigmoid(signs * (image_to_text + bias)).sum(dim=1).mean()
    text_to_image = transpose(image_to_text.detach(), shared)  # for hard negatives alone, which carry no gradient
    return Contrast(shared.weigh(loss, len(image), shared.total), image_to_text, text_to_image)


class Rivals(NamedTuple):
    """Hard negatives, by their places in the batch; -1 where a row has none, because everything in it matches it."""

    texts: Tensor  # [B] int64: for each image, a text that is not its own
    images: Tensor  # [B] int64: for each text, an image that is not its own


def hard_negatives(
    image_to_text: Tensor, text_to_image: Tensor, positives: Tensor, draws: Tensor | None = None
) -> Rivals:
    """One negative text for each image and one negative image for each text, the more similar the likelier.

    Drawn from the softmax of the similarities `[B, G]` with positives masked out *before* the softmax, so that no
    rounding can bring one back. No gradient.

    Args:
        draws: `[2, B]` fp64 in [0, 1), the chance in it, for texts and for images; None = from torch's generator.
    """
    if draws is None:
        draws = torch.rand(2, len(positives), dtype=torch.float64).to(positives.device)
    of_image, of_text = draws
    return Rivals(_draw(image_to_text.detach(), positives, of_image), _draw(text_to_image.detach(), positives, of_text))


def _draw(scores: Tensor, positives: Tensor, chance: Tensor) -> Tensor:
    has_rival = ~positives.all(dim=1)
    weights = scores.double().masked_fill(positives, -torch.inf)
    # A row of -inf alone would become NaN: give it any distribution, and mark what is drawn from it as no rival.
    summed = weights.masked_fill(~has_rival[:, None], 0.0).softmax(dim=1).cumsum(dim=1)
    # The first place where the sum is beyond the chance: never one that adds nothing to it, as a positive does.
    # For any chance < 1 the product rounds to less than the last sum.
    found = torch.searchsorted(summed, chance[:, None] * summed[:, -1:], right=True)[:, 0]
    return found.where(has_rival, -1)


def matching(logits: Tensor, is_match: Tensor) -> Tensor:
    """Image-text matching loss: `logits [N, 2]` (class 1 = match), `is_match [N]` bool.

    With one true pair to two false ones chance is 0.6365: a loss that stays there has learned nothing.
    """
    return F.cross_entropy(logits.float(), is_match.long())


def generation(logits: Tensor, targets: Tensor, label_smoothing: float = 0.1) -> Tensor:
    """Image-grounded text generation loss: word logits `[N, W]` at the `N` positions with a target, `targets [N]`."""
    return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)


def decorrelation(queries: Tensor) -> Tensor:
    """Mean squared cosine between the outputs of two queries of one picture, in what differs between pictures.

    Not in the paper. ITC, ITM and ITG are content if each query holds the whole picture, and then all queries become
    one vector. Each query's mean over the batch is subtracted first, without a gradient, because outputs that differ
    by a constant alone hold the same about a picture.

    Args:
        queries: `[B, Q, D]`, query outputs.

    Returns:
        A scalar in [0, 1]; 0 if the queries of each picture are orthogonal, or if there is only one.
    """
    rows = F.normalize(queries.float() - queries.detach().float().mean(dim=0), dim=-1)
    cosines = rows @ rows.mT
    count = cosines.shape[-1]
    others = cosines.square().sum(dim=(1, 2)) - cosines.diagonal(dim1=1, dim2=2).square().sum(dim=1)
    return (others / max(1, count * (count - 1))).mean()


CHUNK_BYTES = 64 * 2**20  # of fp32 logits at a time
FEWEST_ROWS = 256  # below that a product is bound by reading the weight


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    label_smoothing: float = 0.0,
    chunk: int | None = None,
) -> Tensor:
    """Mean cross-entropy of the logits `hidden @ weight.T + bias` without ever holding all of them.

    The gradient is computed chunk by chunk along with the loss, for the inputs that require one; not twice
    differentiable. Products are in autocast's dtype, as `F.linear`'s; sums over chunks in fp32.

    Args:
        hidden: `[N, D]`, N >= 1. weight: `[W, D]`. bias: `[W]`. targets: `[N]` int64.
        chunk: rows at a time; None = what fits `CHUNK_BYTES`. All N in one chunk are computed the plain way.
    """
    if chunk is None:
        chunk = max(FEWEST_ROWS, CHUNK_BYTES // (4 * len(weight)))
    if len(targets) <= chunk:
        return generation(F.linear(hidden, weight, bias), targets, label_smoothing)
    place = hidden.device.type
    dtype = torch.get_autocast_dtype(place) if torch.is_autocast_enabled(place) else weight.dtype
    with torch.autocast(place, enabled=False):
        loss = _ChunkedCrossEntropy.apply(
            hidden, weight, bias, targets, label_smoothing, chunk, dtype, torch.is_grad_enabled()
        )
    assert isinstance(loss, Tensor)
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        smoothing: float,
        chunk: int,
        dtype: torch.dtype,
        trains: bool,
    ) -> Tensor:
        of_hidden, of_weight, of_bias = (
            torch.zeros_like(given, dtype=torch.float32) if trains and wanted and given is not None else None
            for given, wanted in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        )
        factor, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
        loss = torch.zeros((), device=hidden.device)
        for first in range(0, len(targets), chunk):
            part = slice(first, first + chunk)
            rows, wanted = hidden[part].to(dtype), targets[part, None]
            logs = F.linear(rows, factor, offset).float().log_softmax(dim=1)
            loss -= (1 - smoothing) * logs.gather(1, wanted).sum() + smoothing * logs.mean(dim=1).sum()
            if of_hidden is None and of_weight is None and of_bias is None:
                continue
            # The gradient at the logits, but for the mean's 1 / N: what is likely less what is wanted.
            error = logs.exp_().sub_(smoothing / len(weight))
            error.scatter_add_(1, wanted, torch.full_like(error[:, :1], smoothing - 1))
            if of_bias is not None:
                of_bias += error.sum(dim=0)
            error = error.to(dtype)
            if of_hidden is not None:
                of_hidden[part] = error @ factor
            if of_weight is not None:
                of_weight += error.T @ rows
        gradients = (of_hidden, of_weight, of_bias)
        given = (hidden, weight, bias)
        ctx.save_for_backward(
            *(None if g is None else g.div_(len(targets)).to(x.dtype) for g, x in zip(gradients, given, strict=True))  # pyright: ignore
        )
        return loss / len(targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return *(None if g is None else g * upstream[0] for g in ctx.saved_tensors), *[None] * 5
