"""Hard negatives found in the joined batch of all processes come to where they are needed, and nothing else does.

Of an image the encoder's features travel, once to each process that a text of wants it, and never the keys and values
that are made of them: 6 layers' are 9,216 numbers a patch where ViT-g's features are 1,408, and of keys and values the
gradient had to travel back, too. Frozen features have none; who receives them computes LayerNorm, keys and values
itself, and the gradient of those parameters is summed with all others. Texts travel as token ids.

Shapes: B pairs here, G over all processes, P patch tokens, V encoder width, T text tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from openblip2.distributed import Share, fetch, gather, plan
from openblip2.model.objectives import Rivals


class AtHand(NamedTuple):
    """What a process needs for its own share of image-text matching.

    Attributes:
        fetched: `[n, P, V]`, features of other processes' images, at most B.
        tokens, valid: `[M, T]`, our own texts, and behind them, in several processes, those of all.
        rivals: places in our own images followed by `fetched`, and in `tokens`.
        pairs: how many pairs there are, over all processes.
    """

    fetched: Tensor
    tokens: Tensor
    valid: Tensor
    rivals: Rivals
    pairs: int | Tensor


def bring(rivals: Rivals, patches: Tensor, tokens: Tensor, valid: Tensor, shared: Share) -> AtHand:
    """Brings what `rivals`, places in the joined batch, stand for.

    Args:
        patches: `[B, P, V]`, of our images; gradients go back to whose they are, where they are asked for.
        tokens: `[B, T]`. valid: `[B, T]` bool. T may differ from process to process: `shared.most[0]` is the largest.
    """
    asked = torch.stack([rivals.texts, rivals.images], dim=1)
    if shared.one:
        return AtHand(patches[:0], tokens, valid, rivals, len(tokens) + (asked >= 0).sum())
    asked = gather(asked, shared)
    route = plan([part[:, 1].tolist() for part in asked.cpu().split(shared.counts)], shared)
    # One message: a token that is padding is told by its sign.
    marked = F.pad(tokens.where(valid, -1), (0, shared.most[0] - tokens.shape[1]), value=-1).to(torch.int32)
    texts = torch.cat([marked, gather(marked, shared)]).long()
    at_hand = Rivals(
        torch.where(rivals.texts < 0, -1, rivals.texts + len(tokens)),
        torch.tensor(route.places, dtype=torch.int64, device=tokens.device),
    )
    pairs = shared.total + int((asked >= 0).sum())
    return AtHand(fetch(patches, route), texts.clamp(min=0), texts >= 0, at_hand, pairs)
