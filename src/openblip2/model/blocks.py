"""BERT's building blocks, used in the Q-Former: attention, feed-forward network, language-modelling head.

Shapes: B rows of a batch, N positions, D width, H heads, W vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openblip2.compat import allow_recompiles
from openblip2.errors import UserError, one_line
from openblip2.hardware import dot_product_attention

INIT_STD = 0.02  # as in BERT, and in the paper for the queries
NORM_EPS = 1e-12  # as in BERT
KINDS = 64  # limit of compiled variants of a block (mask, gradient, text, dropout); torch's default is 8

KeysValues = tuple[Tensor, Tensor]  # each [B, H, N, D / H]


class Attention(nn.Module):
    """BERT's attention block, LayerNorm after the residual sum; keys and values may be from another source."""

    def __init__(self, width: int, heads: int, source_width: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.drop = heads, dropout
        self.watched: list[Tensor] | None = None  # if a list, each pass appends its weights to it (inference/attend.py)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width)  # from the encoder's width in cross-attention
        self.value = nn.Linear(source_width, width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def keys_values(self, source: Tensor) -> KeysValues:
        return self._split(self.key(source)), self._split(self.value(source))

    def forward(self, rows: Tensor, source: KeysValues, mask: Tensor | None = None) -> Tensor:
        """`rows [B, N, D]` -> the same shape."""
        queries = self._split(self.query(rows))
        if self.watched is None:
            dropped = self.drop if self.training else 0.0  # the function itself has no eval mode
            found = dot_product_attention(queries, *source, mask, dropped)
        else:
            found = self._watched(queries, *source, self.watched)
        return self.norm(rows + self.dropout(self.out(found.transpose(1, 2).flatten(2))))

    def _watched(self, queries: Tensor, keys: Tensor, values: Tensor, weights: list[Tensor]) -> Tensor:
        """The same without mask and dropout; stores the attention weights `[B, H, rows, source rows]`."""
        weights.append((queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5).float().softmax(dim=-1))
        return weights[-1].to(values.dtype) @ values

    def _split(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, N, D] -> [B, H, N, D / H]


class FeedForward(nn.Module):
    """BERT's feed-forward block: erf-GELU between two linear maps, LayerNorm after the residual sum."""

    def __init__(self, width: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.widen = nn.Linear(width, inner)
        self.narrow = nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, rows: Tensor) -> Tensor:
        return self.norm(rows + self.dropout(self.narrow(F.gelu(self.widen(rows)))))


class LMHead(nn.Module):
    """BERT's masked-language-model head, with which ITG predicts words; its decoder is tied to the word embeddings."""

    def __init__(self, width: int, words: nn.Embedding) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.bias = nn.Parameter(torch.zeros(words.num_embeddings))  # an embedding has no bias that could be tied
        nn.init.normal_(self.dense.weight, std=INIT_STD)
        nn.init.zeros_(self.dense.bias)

    def forward(self, rows: Tensor, words: nn.Embedding) -> Tensor:
        """`rows [..., D]` -> word logits `[..., W]`."""
        return F.linear(self.hidden(rows), words.weight, self.bias)  # tied to the embeddings, as in BERT

    def hidden(self, rows: Tensor) -> Tensor:
        """Inputs of the decoder: `rows [..., D]` -> `[..., D]`."""
        return self.norm(F.gelu(self.dense(rows)))


def compile_blocks(connector: nn.Module) -> None:
    """Compiles attention and feed-forward blocks with `torch.compile`, in place, on first use; names do not change.

    There are only a few kinds of blocks with the same code, so that compilation takes seconds to a minute, and not many
    minutes as for the whole model, and does not depend on the pass in which a block is used. Raises a `UserError` if
    this machine has no compiler.
    """
    blocks = [block for block in connector.modules() if isinstance(block, Attention | FeedForward)]
    try:
        for block in blocks[:1]:
            torch.compile(nn.functional.gelu)(torch.ones(64, device=next(block.parameters()).device))
    except Exception as error:  # the exception depends on what is missing; the message includes it
        raise UserError(
            f"train.compile=true: torch.compile does not work here ({one_line(error)}): a CPU needs a C++ compiler, a "
            "GPU needs triton"
        ) from error
    allow_recompiles(KINDS)
    for block in blocks:
        block.compile(dynamic=True)
