"""The Querying Transformer (paper, section 3.1).

One BERT-shaped stack, two streams of rows that share its self-attention: `Q` learned queries, which look at
the image by cross-attention in every second layer and have a feed-forward network of their own, and `T` text
tokens, which never see the image directly and keep BERT's feed-forward network.

Shapes: B images, P patch tokens, V encoder width, Q queries, T text tokens, D width, H heads, W vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

INIT_STD = 0.02  # BERT's, and the paper's for the queries
NORM_EPS = 1e-12  # BERT's

KeysValues = tuple[Tensor, Tensor]  # each [B, H, rows, D / H]


@dataclass(frozen=True)
class Memory:
    """What the Q-Former may know of the images: cross-attention keys and values, one pair for each crossing layer.

    They depend on the image alone, so they are computed once and shared by every pass over that image.
    """

    layers: tuple[KeysValues, ...]

    def take(self, images: Tensor) -> "Memory":
        """The memory of the given images, in the given order, repeats allowed: `images [N]`, int64."""
        # index_select and not keys[images]: the gradient of repeats is added up several times faster.
        return Memory(tuple((k.index_select(0, images), v.index_select(0, images)) for k, v in self.layers))

    def join(self, others: "Memory") -> "Memory":
        """The memory of these images, and of others behind them."""
        both = zip(self.layers, others.layers, strict=True)
        return Memory(tuple((torch.cat([k, more_k]), torch.cat([v, more_v])) for (k, v), (more_k, more_v) in both))


class Seen(NamedTuple):
    """The outcome of one pass."""

    queries: Tensor | None  # [B, Q, D]
    text: Tensor | None  # [B, T, D]; with `keep_text` the first rows only, None without any
    cache: tuple[KeysValues, ...]  # self-attention keys and values of all rows, for `QFormer.write`


class QFormer(nn.Module):
    """`Q` learned queries that read an image, and BERT's text stream beside them.

    Args:
        width: D. layers: depth. heads: attention heads, a divisor of `width`. ffn: inner width of the FFNs.
        queries: Q. image_width: V of the frozen encoder.
        vocabulary: W, `[DEC]` included; 0 leaves out the text path (stage 2).
        positions: longest text. cross_every: cross-attention in layers 0, n, 2n, ...
        dropout: share of units and of attention weights dropped in training.
        image_norm_eps: of the LayerNorm on the image features.
        self_attention_scale: factor on what self-attention adds to the query rows; text rows are never scaled. Ours;
            1 = the paper. Below 1 it keeps the queries different (docs/decisions.md).
        cross_attention_std: standard deviation of the first query and key weights of cross-attention. Ours; 0.02 = the
            paper. With 0.02 a narrow Q-Former begins with uniform attention: all queries see the mean patch.

    Raises:
        ValueError: `width` is not a multiple of `heads`.
    """

    def __init__(
        self,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        ffn: int = 3072,
        queries: int = 32,
        image_width: int = 1408,
        vocabulary: int = 30523,
        positions: int = 512,
        cross_every: int = 2,
        dropout: float = 0.1,
        image_norm_eps: float = 1e-5,
        self_attention_scale: float = 1.0,
        cross_attention_std: float = INIT_STD,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"Q-Former width {width} is not a multiple of its {heads} heads")
        self.width, self.image_width = width, image_width
        self.checkpoint_activations = False  # True: the backward pass computes each layer again instead of keeping it
        self.sizes = {"width": width, "layers": layers, "heads": heads, "ffn": ffn, "vocabulary": vocabulary}
        self.sizes["positions"] = positions
        self.image_norm = nn.LayerNorm(image_width, eps=image_norm_eps)  # "ln_vision": trained in both stages
        self.queries = nn.Parameter(torch.randn(1, queries, width) * INIT_STD)
        self.words = nn.Embedding(vocabulary, width) if vocabulary else None
        self.positions = nn.Embedding(positions, width) if vocabulary else None
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            Layer(
                width,
                heads,
                ffn,
                image_width if n % cross_every == 0 else 0,
                bool(vocabulary),
                dropout,
                self_attention_scale,
            )
            for n in range(layers)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INIT_STD)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for layer in self.layers:
            if isinstance(layer, Layer) and layer.cross is not None and cross_attention_std != INIT_STD:
                nn.init.normal_(layer.cross.query.weight, std=cross_attention_std)
                nn.init.normal_(layer.cross.key.weight, std=cross_attention_std)

    def look(self, patches: Tensor) -> Memory:
        """Image keys and values, once for each image: `patches [B, P, V]`, as the frozen encoder gives them."""
        with torch.autocast(patches.device.type, enabled=False):
            patches = self.image_norm(patches.float())
        crossing = [layer.cross for layer in self.layers if isinstance(layer, Layer) and layer.cross is not None]
        return Memory(tuple(cross.keys_values(patches) for cross in crossing))

    def forward(
        self,
        memory: Memory | None = None,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        keep_text: int | None = None,
    ) -> Seen:
        """One pass over queries (if `memory` is given), text (if `tokens` are given), or both.

        Args:
            memory: what `look` gave for the `B` images; or of fewer that divide `B`, each for `B / images` texts in
                a row, which then share its keys and values.
            tokens: `[B, T]` int64.
            mask: one of `masks`, broadcastable to `[B, H, rows, rows]`; None = everybody looks at everybody.
            keep_text: how many text rows the caller reads, from the first on; None = all. The last layer computes
                the others as keys and values only.
        """
        queries = self._embed_queries(memory, tokens) if memory is not None else None
        text = self.embed_text(tokens) if tokens is not None else None
        return self._run(queries, text, memory, mask, None, keep_text)

    def query_output(self, patches: Tensor) -> Tensor:
        """What the queries read from the images alone: `patches [B, P, V]` -> `[B, Q, D]`."""
        return self(self.look(patches)).queries

    def write(self, alone: Seen, tokens: Tensor, mask: Tensor, keep_text: int | None = None) -> Tensor:
        """The text rows of a pass under the causal mask, from a query pass done before: `[B, T, D]`.

        Query rows never look at text under that mask, so their keys and values are those of queries alone.

        Args:
            alone: what `forward(memory)` gave. Its cache is not detached: gradients reach the queries.
            tokens: `[B, T]`. mask: `masks.causal(Q, valid)`, the rows of queries included.
            keep_text: as in `forward`.
        """
        text = self.embed_text(tokens)
        seen = self._run(None, text, None, mask[:, :, -tokens.shape[1] :], alone.cache, keep_text)
        assert seen.text is not None
        return seen.text

    def _embed_queries(self, memory: Memory, tokens: Tensor | None) -> Tensor:
        rows = self.dropout(self.norm(self.queries))
        return rows.expand((memory.layers[0][0] if tokens is None else tokens).shape[0], -1, -1)

    def embed_text(self, tokens: Tensor) -> Tensor:
        """Text rows as they enter the first layer: `[B, T]` -> `[B, T, D]`."""
        # Positions start at 0 whether or not queries stand in front; there is no token-type embedding.
        if self.words is None or self.positions is None:
            raise ValueError("this Q-Former has no text path (stage 2 leaves it out); load a stage-1 run for text")
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.dropout(self.norm(self.words(tokens) + self.positions(places)))

    def _run(
        self,
        queries: Tensor | None,
        text: Tensor | None,
        memory: Memory | None,
        mask: Tensor | None,
        past: tuple[KeysValues, ...] | None,
        keep_text: int | None,
    ) -> Seen:
        cache: list[KeysValues] = []
        images = iter(memory.layers) if memory is not None else iter(())
        for n, layer in enumerate(self.layers):
            image = next(images) if layer.cross is not None and queries is not None else None
            keep = keep_text if n == len(self.layers) - 1 else None
            given = (queries, text, image, mask, past[n] if past else None, keep)
            if self.checkpoint_activations:
                queries, text, own = checkpoint(layer, *given, use_reentrant=False)
            else:
                queries, text, own = layer(*given)
            cache.append(own)
        return Seen(queries, text, tuple(cache))


class Layer(nn.Module):
    """Self-attention over all rows, cross-attention and one FFN for the queries, another FFN for the text."""

    def __init__(
        self,
        width: int,
        heads: int,
        ffn: int,
        image_width: int,
        text: bool,
        dropout: float,
        self_attention_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.self_attention_scale = self_attention_scale
        self.attention = Attention(width, heads, width, dropout)
        self.cross = Attention(width, heads, image_width, dropout) if image_width else None
        self.query_ffn = FeedForward(width, ffn, dropout)
        self.text_ffn = FeedForward(width, ffn, dropout) if text else None

    def forward(
        self,
        queries: Tensor | None,
        text: Tensor | None,
        image: KeysValues | None,
        mask: Tensor | None,
        past: KeysValues | None,
        keep_text: int | None = None,
    ) -> tuple[Tensor | None, Tensor | None, KeysValues]:
        rows = _join(queries, text)
        keys, values = self.attention.keys_values(rows)
        if past is not None:
            keys, values = torch.cat([past[0], keys], dim=2), torch.cat([past[1], values], dim=2)
        if text is not None and keep_text is not None:  # the others are looked at, but look no more themselves
            text = text[:, :keep_text] if keep_text else None
            rows = _join(queries, text)
            mask = None if mask is None else mask[:, :, : rows.shape[1]]
        scale = None
        if queries is not None and self.self_attention_scale != 1.0:
            # Queries attend to each other almost uniformly, so self-attention adds the same large vector to all of
            # them. Scaled down, it cannot replace what each query has read from the image.
            scale = rows.new_ones(rows.shape[1], 1)
            scale[: queries.shape[1]] = self.self_attention_scale
        rows = self.attention(rows, (keys, values), mask, scale)
        if queries is not None:
            count = queries.shape[1]
            looking, rows = rows[:, :count], rows[:, count:]
            if self.cross is not None and image is not None:
                # All queries that look at one image stand side by side: its keys and values are never copied.
                each = -1 if looking.shape[0] else count  # a process without images: -1 would be ambiguous
                beside = looking.reshape(image[0].shape[0], each, looking.shape[2])
                looking = self.cross(beside, image).reshape(looking.shape)
            queries = self.query_ffn(looking)
        if text is not None:
            assert self.text_ffn is not None
            text = self.text_ffn(rows)
        return queries, text, (keys, values)


def _join(queries: Tensor | None, text: Tensor | None) -> Tensor:
    return torch.cat([part for part in (queries, text) if part is not None], dim=1)


class Attention(nn.Module):
    """BERT's attention block, LayerNorm behind the residual sum; keys and values may come from elsewhere."""

    def __init__(self, width: int, heads: int, source_width: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.drop = heads, dropout
        self.watched: list[Tensor] | None = None  # a list collects the weights of each pass (model/relevance.py)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width)
        self.value = nn.Linear(source_width, width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def keys_values(self, source: Tensor) -> KeysValues:
        return self._split(self.key(source)), self._split(self.value(source))

    def forward(
        self, rows: Tensor, source: KeysValues, mask: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """`rows [B, N, D]` -> the same; `scale [N, 1]` multiplies what attention adds to each row, None = 1."""
        queries = self._split(self.query(rows))
        if self.watched is None:
            dropped = self.drop if self.training else 0.0
            found = F.scaled_dot_product_attention(queries, *source, attn_mask=mask, dropout_p=dropped)
        else:
            found = self._watched(queries, *source, self.watched)
        found = self.out(found.transpose(1, 2).flatten(2))
        if scale is not None:
            found = found * scale
        return self.norm(rows + self.dropout(found))

    def _watched(self, queries: Tensor, keys: Tensor, values: Tensor, weights: list[Tensor]) -> Tensor:
        """The same, unmasked and without dropout, by weights `[B, H, rows, source rows]` that are kept."""
        weights.append((queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5).float().softmax(dim=-1))
        return weights[-1].to(values.dtype) @ values

    def _split(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """BERT's feed-forward block: erf-GELU between two linear maps, LayerNorm behind the residual sum."""

    def __init__(self, width: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.widen = nn.Linear(width, inner)
        self.narrow = nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, rows: Tensor) -> Tensor:
        return self.norm(rows + self.dropout(self.narrow(F.gelu(self.widen(rows)))))


class WordHead(nn.Module):
    """BERT's masked-language-model head, which ITG uses to write; its decoder is tied to the word embedding."""

    def __init__(self, width: int, words: nn.Embedding) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.bias = nn.Parameter(torch.zeros(words.num_embeddings))
        nn.init.normal_(self.dense.weight, std=INIT_STD)
        nn.init.zeros_(self.dense.bias)

    def forward(self, rows: Tensor, words: nn.Embedding) -> Tensor:
        """`rows [..., D]` -> word logits `[..., W]`."""
        return F.linear(self.hidden(rows), words.weight, self.bias)

    def hidden(self, rows: Tensor) -> Tensor:
        """What the decoder reads: `rows [..., D]` -> `[..., D]`."""
        return self.norm(F.gelu(self.dense(rows)))
