"""Where the queries look: cross-attention weights, and which patches a score depends on.

Shapes: B images, Q queries, H heads, P patch tokens, T text tokens, L LLM width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from openblip2.model.qformer import Layer, QFormer


@contextmanager
def watching(qformer: QFormer) -> Iterator[list[Tensor]]:
    """Inside it each pass over images adds its cross-attention weights, `[B, H, Q, P]` for each crossing layer.

    Each row sums to 1. Where gradients are on, the pass goes through them. No dropout is applied to them.
    """
    crossing = [layer.cross for layer in qformer.layers if isinstance(layer, Layer) and layer.cross is not None]
    found: list[Tensor] = []
    for cross in crossing:
        cross.watched = found
    try:
        yield found
    finally:
        for cross in crossing:
            cross.watched = None


def attention(weights: Sequence[Tensor]) -> Tensor:
    """How much each query looks at each patch: `[B, Q, P]`, the mean over layers and heads; rows sum to 1."""
    return torch.stack([layer.detach().mean(dim=1) for layer in weights]).mean(dim=0)


def relevance(score: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """How much more the score would be if the queries looked more at a patch, and as much less elsewhere: `[B, P]`.

    Weight times gradient, as Grad-CAM has it for attention (Chefer et al., 2021), the gradient less its mean over the
    patches that are looked at: weights sum to 1, so one cannot grow alone. Summed over layers, heads and queries, and
    of what speaks against a patch nothing is taken off.

    Args:
        score: one number, the sum over B images of scores that depend on their own image alone. It may be asked
            again about another score of the same pass.
        weights: of that pass, as `watching` collects them.
    """
    found: list[Tensor] = []
    for weight, gradient in zip(weights, torch.autograd.grad(score, list(weights), retain_graph=True), strict=True):
        more = gradient - (weight * gradient).sum(dim=-1, keepdim=True)  # times the weight: the gradient at its logit
        found.append((weight * more.clamp(min=0)).sum(dim=(1, 2)))  # over heads and queries: [B, P]
    return torch.stack(found).sum(dim=0).detach()
