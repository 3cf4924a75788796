"""The Querying Transformer (paper, section 3.1 and figure 2).

A BERT-like stack of layers for two kinds of rows, which share self-attention: `Q` learned queries, which read the image
by cross-attention in every second layer and have their own feed-forward network, and `T` text tokens, which never read
the image directly and use BERT's feed-forward network.

The objectives differ in the self-attention mask. Below is figure 2 for Q = 2 and T = 4; the last token is padding, and
its row is omitted. Rows attend to columns, queries come before text, 1 = may attend; under each mask are its passes:

    uni-modal (ITC)      bi-directional (ITM)   multimodal causal (ITG)
    1 1 . . . .          1 1 1 1 1 .            1 1 . . . .
    1 1 . . . .          1 1 1 1 1 .            1 1 . . . .
    . . 1 1 1 .          1 1 1 1 1 .            1 1 1 . . .
    . . 1 1 1 .          1 1 1 1 1 .            1 1 1 1 . .
    . . 1 1 1 .          1 1 1 1 1 .            1 1 1 1 1 .
    query_pass           joint_pass             causal_pass
    text_pass

Shapes: B images, P patch tokens, V encoder width, Q queries, T text tokens, D width, H heads, W vocabulary.
"""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openblip2.model.blocks import INIT_STD, NORM_EPS, Attention, FeedForward, KeysValues
from openblip2.model.connector import Connector, Question

Cache = tuple[KeysValues, ...]  # self-attention keys and values, one pair for each layer


def unimodal_mask(queries: int, valid: Tensor) -> Tensor:
    """ITC: queries attend to queries and text to text.

    Args:
        queries: Q; 0 gives the mask of a pass over text alone.
        valid: `[B, T]` bool, True = a real token, not padding.

    Returns:
        `[B, 1, Q + T, Q + T]` bool, to be broadcast over attention heads.
    """
    rows, columns, real = _grid(queries, valid)
    return real & ((rows < queries) == (columns < queries))  # both queries, or both text: two blocks


def bidirectional_mask(queries: int, valid: Tensor) -> Tensor:
    """ITM: every row attends to all rows except padding; arguments and shape as for `unimodal_mask`."""
    rows, _, real = _grid(queries, valid)
    return real & (rows >= 0)  # always True: it only expands the mask to Q + T rows


def causal_mask(queries: int, valid: Tensor) -> Tensor:
    """ITG: queries attend to queries, a token to queries, itself and earlier tokens; as for `unimodal_mask`."""
    rows, columns, real = _grid(queries, valid)
    return real & ((columns < queries) | (columns <= rows))  # for a query row, both conditions allow queries only


def _grid(queries: int, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row numbers `[Q + T, 1]`, column numbers `[Q + T]`, and which columns are not padding: `[B, 1, 1, Q + T]`."""
    numbers = torch.arange(queries + valid.shape[1], device=valid.device)
    real = torch.cat([valid.new_ones(len(valid), queries), valid], dim=1).bool()  # queries are never padding
    return numbers[:, None], numbers, real[:, None, None]


class Memory(NamedTuple):
    """Cross-attention keys and values of images, one pair for each layer that has cross-attention.

    They depend on the image only, so they are computed once and shared by every pass over that image.
    """

    layers: tuple[KeysValues, ...]

    def take(self, images: Tensor) -> "Memory":
        """The memory of the images with these indices, `images [N]` int64; an image may be repeated."""
        # index_select instead of keys[images]: its backward pass is several times faster for repeated images.
        return Memory(tuple((k.index_select(0, images), v.index_select(0, images)) for k, v in self.layers))

    def join(self, others: "Memory") -> "Memory":
        """The memory of these images, followed by that of `others`."""
        both = zip(self.layers, others.layers, strict=True)
        return Memory(tuple((torch.cat([k, more_k]), torch.cat([v, more_v])) for (k, v), (more_k, more_v) in both))


class QFormerOutput(NamedTuple):
    """The output of one pass."""

    queries: Tensor | None  # [B, Q, D]; None in a pass over text alone
    text: Tensor | None  # [B, T, D], or the first `keep_text` rows; None if there are none
    cache: Cache  # keys and values of all rows


class QFormer(Connector):
    """The Q-Former: `Q` learned queries that read an image, combined with BERT's layers for text.

    Args:
        width: D.
        layers: number of layers.
        heads: number of attention heads, a divisor of `width`.
        ffn: inner width of the feed-forward networks.
        queries: Q.
        image_width: V, of the frozen encoder.
        vocabulary: W, including `[DEC]`; 0 omits the text path (stage 2).
        positions: maximum length of a text in tokens.
        cross_every: n, for cross-attention in layers 0, n, 2n, ...
        dropout: dropout probability of units and of attention weights.
        image_norm_eps: epsilon of the LayerNorm on the image features.

    Raises:
        ValueError: `width` is not a multiple of `heads`.
    """

    name: ClassVar[str] = "qformer"
    has_stage1: ClassVar[bool] = True

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
    ) -> None:
        super().__init__(queries, width, image_width)
        if width % heads:
            raise ValueError(f"Q-Former width {width} is not a multiple of its {heads} heads")
        self.reads_questions = vocabulary > 0
        self.sizes = {"width": width, "layers": layers, "heads": heads, "ffn": ffn, "vocabulary": vocabulary}
        self.sizes["positions"] = positions
        self.image_norm = nn.LayerNorm(image_width, eps=image_norm_eps)  # "ln_vision": trained in both stages
        self.queries = nn.Parameter(torch.randn(1, queries, width) * INIT_STD)  # "learnable query embeddings" (3.1)
        self.word_embeddings = nn.Embedding(vocabulary, width) if vocabulary else None  # its last row is [DEC]
        self.positions = nn.Embedding(positions, width) if vocabulary else None
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)  # BERT's embedding norm, shared by queries and text
        self.dropout = nn.Dropout(dropout)
        crossing = [image_width if n % cross_every == 0 else 0 for n in range(layers)]  # 3.1: every second layer
        self.layers = nn.ModuleList(Layer(width, heads, ffn, image, bool(vocabulary), dropout) for image in crossing)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INIT_STD)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def encode_image(self, patches: Tensor) -> Memory:
        """Cross-attention keys and values of images, from the frozen encoder's output `patches [B, P, V]`."""
        # In fp32, because a mean and a variance over V numbers would be too imprecise in half precision.
        with torch.autocast(patches.device.type, enabled=False):
            patches = self.image_norm(patches.float())
        crossing = [layer.cross for layer in self.layers if isinstance(layer, Layer) and layer.cross is not None]
        return Memory(tuple(cross.keys_values(patches) for cross in crossing))

    def query_pass(self, memory: Memory) -> tuple[Tensor, Cache]:
        """Uni-modal mask, queries only: returns `[B, Q, D]` and the cache that `causal_pass` continues."""
        output = self(memory)
        return output.queries, output.cache

    def text_pass(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """Uni-modal mask, text only: tokens `[B, T]` -> the output at `[CLS]`, `[B, D]`."""
        return self(tokens=tokens, mask=unimodal_mask(0, valid), keep_text=1).text[:, 0]  # ITC uses [CLS] only

    def joint_pass(self, memory: Memory, tokens: Tensor, valid: Tensor) -> Tensor:
        """Bi-directional mask: images and tokens `[B, T]` -> the query outputs, which depend on both, `[B, Q, D]`."""
        return self(memory, tokens, bidirectional_mask(self.queries.shape[1], valid), keep_text=0).queries

    def causal_pass(self, cache: Cache, tokens: Tensor, valid: Tensor, keep_text: int | None = None) -> Tensor:
        """Multimodal causal mask: tokens `[B, T]` -> the text outputs, `[B, T, D]`, or the first `keep_text` of them.

        Under this mask query rows never attend to text, so they are the same as in `query_pass`, whose `cache` is
        reused. The cache is not detached, so gradients reach the queries.
        """
        mask = causal_mask(self.queries.shape[1], valid)[:, :, -tokens.shape[1] :]  # query rows are in the cache
        return self(tokens=tokens, mask=mask, keep_text=keep_text, past=cache).text

    def query_output(self, patches: Tensor) -> Tensor:
        """Query outputs for images, without text: `patches [B, P, V]` -> `[B, Q, D]`."""
        return self.query_pass(self.encode_image(patches))[0]

    def visual_tokens(self, patches: Tensor, question: Question | None = None) -> Tensor:
        """The query outputs; with a question, the queries also attend to its tokens (paper 4.3)."""
        if question is None:
            return self.query_output(patches)
        return self.joint_pass(self.encode_image(patches), *question)

    def forward(
        self,
        memory: Memory | None = None,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        keep_text: int | None = None,
        past: Cache | None = None,
    ) -> QFormerOutput:
        """One pass over queries (if `memory` is given), text (if `tokens` are given), or both, under any mask.

        Args:
            memory: of `B` images; or of fewer images, a divisor of `B`: then `B / images` consecutive texts belong to
                each image and share its keys and values.
            tokens: `[B, T]` int64.
            mask: broadcastable to `[B, H, rows, rows]`; None = every row attends to every row.
            keep_text: how many text rows to return, counted from the first; None = all. For the other rows, the last
                layer computes only keys and values.
            past: keys and values of preceding rows, from an earlier pass; `mask` must have columns for them.
        """
        queries, images = None, iter(())
        if memory is not None:
            rows = (memory.layers[0][0] if tokens is None else tokens).shape[0]
            queries, images = self.dropout(self.norm(self.queries)).expand(rows, -1, -1), iter(memory.layers)
        text = self.embed_text(tokens) if tokens is not None else None
        cache: list[KeysValues] = []
        for n, layer in enumerate(self.layers):
            image = next(images) if layer.cross is not None and queries is not None else None  # only queries read it
            keep = keep_text if n == len(self.layers) - 1 else None  # the next layer needs all rows
            given = (queries, text, image, mask, past[n] if past else None, keep)
            if self.checkpoint_activations:
                queries, text, own = checkpoint(layer, *given, use_reentrant=False)
            else:
                queries, text, own = layer(*given)
            cache.append(own)
        return QFormerOutput(queries, text, tuple(cache))

    def embed_text(self, tokens: Tensor) -> Tensor:
        """Embeds text tokens, as input of the first layer: `[B, T]` -> `[B, T, D]`."""
        # Positions start at 0 whether or not queries come before; there is no token-type embedding.
        if self.word_embeddings is None or self.positions is None:
            raise ValueError("this Q-Former has no text path (stage 2 leaves it out); load a stage-1 run for text")
        places = torch.arange(tokens.shape[1], device=tokens.device)  # [T]
        return self.dropout(self.norm(self.word_embeddings(tokens) + self.positions(places)))


class Layer(nn.Module):
    """Self-attention over all rows, cross-attention and one FFN for the queries, another FFN for the text."""

    def __init__(self, width: int, heads: int, ffn: int, image_width: int, text: bool, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads, width, dropout)  # shared by queries and text (figure 2)
        self.cross = Attention(width, heads, image_width, dropout) if image_width else None
        self.query_ffn = FeedForward(width, ffn, dropout)  # initialised as a copy of the text FFN (model/bert.py)
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
        if text is not None and keep_text is not None:  # the other rows need no output
            text = text[:, :keep_text] if keep_text else None  # after `keys_values`, so they are still attended to
            rows = _join(queries, text)
            mask = None if mask is None else mask[:, :, : rows.shape[1]]
        rows = self.attention(rows, (keys, values), mask)
        if queries is not None:
            count = queries.shape[1]
            looking, rows = rows[:, :count], rows[:, count:]
            if self.cross is not None and image is not None:
                # All queries of an image form one row of the batch, so that its keys and values need not be copied.
                each = -1 if looking.shape[0] else count  # with 0 rows (a process without images) -1 is ambiguous
                beside = looking.reshape(image[0].shape[0], each, looking.shape[2])
                looking = self.cross(beside, image).reshape(looking.shape)
            queries = self.query_ffn(looking)
        if text is not None:
            assert self.text_ffn is not None
            text = self.text_ffn(rows)
        return queries, text, (keys, values)


def _join(queries: Tensor | None, text: Tensor | None) -> Tensor:
    return torch.cat([part for part in (queries, text) if part is not None], dim=1)
