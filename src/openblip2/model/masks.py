"""The three self-attention masks of the Q-Former (paper, section 3.1 and figure 2; METHOD of the Q-Former).

`True` = may look. Rows look at columns; the `Q` query rows stand in front of the `T` text rows. With Q = 2,
T = 4 and the last token padding:

    uni-modal (ITC)      bi-directional (ITM)   multimodal causal (ITG)
    1 1 . . . .          1 1 1 1 1 .            1 1 . . . .
    1 1 . . . .          1 1 1 1 1 .            1 1 . . . .
    . . 1 1 1 .          1 1 1 1 1 .            1 1 1 . . .
    . . 1 1 1 .          1 1 1 1 1 .            1 1 1 1 . .
    . . 1 1 1 .          1 1 1 1 1 .            1 1 1 1 1 .

Every function takes `valid [B, T]` (bool, True = a real token) and returns `[B, 1, rows, Q + T]`, ready to be
broadcast over attention heads.
"""

import torch
from torch import Tensor


def unimodal(queries: int, valid: Tensor) -> Tensor:
    """ITC: queries look at queries, text looks at text, and neither sees the other."""
    mask = _to_text(queries, valid)
    mask[:, :queries, :queries] = True
    mask[:, :queries, queries:] = False
    return mask[:, None]


def bidirectional(queries: int, valid: Tensor) -> Tensor:
    """ITM: everybody looks at everybody, only padding is looked at by nobody."""
    mask = _to_text(queries, valid)
    mask[:, :, :queries] = True
    return mask[:, None]


def causal(queries: int, valid: Tensor) -> Tensor:
    """ITG: queries look at queries; a token looks at all queries and at itself and the tokens before it."""
    mask = _to_text(queries, valid)
    mask[:, :, :queries] = True
    mask[:, :queries, queries:] = False
    mask[:, queries:, queries:] &= mask.new_ones(mask.shape[1] - queries, mask.shape[1] - queries).tril()
    return mask[:, None]


def padding(valid: Tensor) -> Tensor:
    """The text rows of `unimodal` alone, for a pass without queries: `[B, 1, 1, T]`."""
    return valid[:, None, None, :]


def _to_text(queries: int, valid: Tensor) -> Tensor:
    """All rows look at the real tokens; nothing looks at a query yet: `[B, Q + T, Q + T]`."""
    batch, length = valid.shape
    mask = valid.new_zeros(batch, queries + length, queries + length, dtype=torch.bool)
    mask[:, :, queries:] = valid[:, None, :].bool()
    return mask
