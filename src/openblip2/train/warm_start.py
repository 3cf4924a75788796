"""Closed-form starts of both stages. Ours, not the paper's; off unless `warm_start` is set.

Stage 1: in a random Q-Former attention to the image is uniform, so that all queries read the same mean patch, and
little of it reaches their outputs. Training mends the second and never the first: the queries stay one pooled vector,
which knows the things and colours of a picture but not where each of them is. `place_queries` makes each query begin
at its own cell of a grid over the picture, and `open_image_path` lets what it reads there through to its output;
`align_heads` solves for the two heads of ITC. All by ridge regression: what a linear map can know of the pictures is
known before the first step, and only weights of the paper's model are set.

Stage 2: from a random projection a language model learns to write captions long before it learns to look. Ridge
regression from the mean query output of stage 1 to the mean input embedding of the caption's content words, rare words
weighted up, moves the soft prompt, before the first step, to where the language model keeps the words of the picture.

Shapes: N pictures, P patch tokens, V encoder width, Q queries, D Q-Former width, E shared space, L LLM width.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openblip2.data.text import BertTokens
from openblip2.model.connector import Connector
from openblip2.model.qformer import Layer, QFormer
from openblip2.model.stage1 import Stage1
from openblip2.model.stage2 import Stage2
from openblip2.model.whitening import RIDGE, fit_whitening

# BERT's FFN was never trained on pictures: at this share of its output the query rows survive six of them.
FFN_SHARE = 0.3
# Of self-attention in stage 2: at 1 alignment stays at a loss of 0.9, at 0.1 it does not (docs/decisions.md).
SELF_ATTENTION_SHARE = 0.1
# How many pictures show where each patch is and what its features look like.
PICTURES = 128
# Logit of a query and a patch of its own cell, where regression is right about both.
SHARPNESS = 6.0

# Features [B, P, V] on the model's device, and B captions.
Pair = tuple[Tensor, Sequence[str]]

# fmt: off
STOP_WORDS = frozenset((
    "a", "an", "the", "of", "on", "in", "at", "to", "by", "and", "or", "with", "is", "are", "was", "were",
    "be", "been", "being", "it", "its", "this", "that", "these", "those", "there", "here", "from", "for",
    "as", "into", "onto", "over",
))
# fmt: on


def warm_start_stage1(model: Stage1, tokens: BertTokens, pairs: Callable[[], Iterable[Pair]]) -> float:
    """`open_image_path`, `place_queries`, then `align_heads`, on the given pictures and captions.

    Returns:
        R2 in the shared space.
    """
    some: list[Tensor] = []
    for patches, _ in pairs():
        some.append(model.qformer.image_norm(patches.float()))
        if sum(map(len, some)) >= PICTURES:
            break
    patches = torch.cat(some)[:PICTURES]
    open_image_path(model.qformer, patches)  # first, because it changes the rows that reach later layers
    place_queries(model.qformer, patches)
    queries, texts = [], []
    for patches, captions in pairs():
        queries.append(mean_query_output(model.qformer, patches))
        ids, valid = (t.to(patches.device) for t in tokens(list(captions)))
        texts.append(model.qformer.text_pass(ids, valid).float())
    return align_heads(model, torch.cat(queries), torch.cat(texts))


def open_image_path(qformer: QFormer, patches: Tensor) -> None:
    """Lets cross-attention hand on the patches that it attends to: value = a rotated whitening, output = identity.

    Args:
        patches: `[N, P, V]`, after the Q-Former's image norm.
    """
    whitening = fit_whitening(patches)
    for layer in qformer.layers:
        assert isinstance(layer, Layer)
        if layer.cross is not None:
            # A rotation for each layer: what later layers add does not cover what earlier ones have written.
            rotation = nn.init.orthogonal_(patches.new_empty(qformer.width, qformer.image_width))
            weight = rotation @ whitening.matrix  # symmetric: x @ matrix is matrix @ x
            layer.cross.value.weight.data.copy_(weight)
            layer.cross.value.bias.data.copy_(-weight @ whitening.mean)
            nn.init.eye_(layer.cross.out.weight)  # what a query attends to is added to its row as it is
        layer.query_ffn.narrow.weight.data.mul_(FFN_SHARE)
        layer.query_ffn.narrow.bias.data.mul_(FFN_SHARE)


def place_queries(qformer: QFormer, patches: Tensor) -> None:
    """Makes each query begin at its own cell of a grid over the picture, in every head of every cross-attention.

    A linear map can read from the feature of a patch where in the picture it is, and from a query row which query it
    is. These two maps, to Q numbers each, become the first weights of the keys and of the queries, so that a logit is
    large where query n meets a patch of cell n. Changes nothing where a head is narrower than Q.

    Args:
        patches: `[N, P, V]`, after the Q-Former's image norm.
    """
    count, pictures = qformer.queries.shape[1], len(patches)
    cells = grid_cells(patches.shape[1], count).to(patches)
    where = ridge(patches.flatten(0, 1), cells.repeat(pictures, 1), penalty=100.0)  # feature of a patch -> its cell
    rows = qformer.norm(qformer.queries).expand(pictures, -1, -1)
    own = torch.eye(count).to(patches).repeat(pictures, 1)  # [N * Q, Q]
    for layer in qformer.layers:
        assert isinstance(layer, Layer)
        asking = layer.attention(rows, layer.attention.keys_values(rows))
        image = None
        if layer.cross is not None:
            width = qformer.width // layer.cross.heads
            if count <= width:
                factor = (SHARPNESS * width**0.5) ** 0.5  # attention divides logits by the root of the width
                which = ridge(asking.flatten(0, 1), own, penalty=10.0)  # row of a query -> its number
                for head in range(layer.cross.heads):
                    chosen = slice(head * width, head * width + count)
                    for linear, (weight, bias) in ((layer.cross.key, where), (layer.cross.query, which)):
                        linear.weight.data[chosen] = (factor * weight.T).to(linear.weight)
                        linear.bias.data[chosen] = (factor * bias).to(linear.bias)
            image = layer.cross.keys_values(patches)
        rows, _, _ = layer(rows, None, image, None, None)  # as the next layer reads them, after these changes


def grid_cells(tokens: int, queries: int) -> Tensor:
    """Which query is to read which patch: `[P, Q]`, one 1 in a row.

    The last patch tokens are a square of side x side patches, row by row. Those in front of it, like `[CLS]`, belong
    to no cell: 1 / Q in each column.

    Args:
        tokens: P.
        queries: Q, the cells of a grid as nearly square as Q allows.
    """
    side = math.isqrt(tokens)
    down = next(n for n in range(math.isqrt(queries), 0, -1) if queries % n == 0)
    across = queries // down
    numbers = torch.arange(side)
    cells = (numbers * down // side)[:, None] * across + numbers * across // side
    front = torch.full((tokens - side * side, queries), 1 / queries)
    return torch.cat([front, F.one_hot(cells.flatten(), queries).float()])


def align_heads(model: Stage1, queries: Tensor, texts: Tensor, penalty: float = 300.0) -> float:
    """Sets both heads of ITC; returns R2 on the given pictures.

    The text head whitens: the `E` widest directions of the `[CLS]` outputs, each of variance 1 (or less, for the
    narrowest). The image head is the ridge regression from the mean query output to that.

    Args:
        queries: `[N, D]`, each picture's query outputs averaged over the queries.
        texts: `[N, D]`, `[CLS]` outputs.
        penalty: of the ridge, in pictures: it weighs as much as the variance that so many of them bring.
    """
    mean_text = texts.double().mean(0)
    centred = texts.double() - mean_text
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(texts))
    wanted = model.text_proj.out_features  # E
    whiten = (axes * (variances + RIDGE * variances.mean()).rsqrt())[:, -wanted:]  # the last are the widest
    whiten = F.pad(whiten, (0, wanted - whiten.shape[1]))  # [D, E], zeros where the text is narrower than that
    set_linear(model.text_proj, whiten, -mean_text @ whiten)
    variance = float(queries.double().var(0, correction=0).mean())  # so that `penalty` counts in pictures
    return fit_linear(model.vision_proj, queries, centred @ whiten, penalty * variance)


def fit_linear(layer: nn.Linear, x: Tensor, y: Tensor, penalty: float) -> float:
    """Ridge regression `x [N, in]` -> `y [N, out]` as the layer's weight and bias; returns R2."""
    weight, bias = ridge(x, y, penalty)
    set_linear(layer, weight, bias)
    y = y.double()
    errors = y - (x.double() @ weight + bias)
    return float(1 - errors.square().sum() / (y - y.mean(0)).square().sum())


def ridge(x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Ridge regression `x [N, in]` -> `y [N, out]` on centred data: weight `[in, out]` and bias `[out]`, fp64."""
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    gram = x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weight = torch.linalg.solve(gram, x.T @ y)
    return weight, mean_y - mean_x @ weight


def set_linear(layer: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    """`weight [in, out]`, `bias [out]`."""
    layer.weight.data.copy_(weight.T)
    layer.bias.data.copy_(bias)


def mean_query_output(connector: Connector, patches: Tensor) -> Tensor:
    """The visual tokens of each picture, averaged: `[B, P, V]` -> `[B, D]`."""
    return connector.visual_tokens(patches).float().mean(1)


def warm_start_stage2(model: Stage2, pairs: Iterable[Pair]) -> float:
    """`shrink_self_attention`, then `align_projection` on the given pictures and captions; returns its R2.

    A Q-Former holds stage 1's weights; another connector has no self-attention of stage 1's.
    """
    if isinstance(model.connector, QFormer):
        # First, because the projection is fitted to what the queries then give.
        shrink_self_attention(model.connector)
    queries, captions = [], []
    for patches, texts in pairs:
        queries.append(mean_query_output(model.connector, patches))
        captions += texts
    return align_projection(model, torch.cat(queries), captions)


def shrink_self_attention(qformer: QFormer) -> None:
    """Lets what self-attention adds to the queries begin at `SELF_ATTENTION_SHARE`.

    After stage 1 queries attend to each other nearly uniformly, and what this adds, the same vector to all of them, is
    larger than the row that it is added to. Each layer so draws the queries together. In stage 2 no text shares these
    weights, and training is free to make them larger again.
    """
    for layer in qformer.layers:
        assert isinstance(layer, Layer)
        layer.attention.out.weight.data.mul_(SELF_ATTENTION_SHARE)
        layer.attention.out.bias.data.mul_(SELF_ATTENTION_SHARE)


def align_projection(model: Stage2, queries: Tensor, captions: Sequence[str], penalty: float = 10.0) -> float:
    """Sets the projection's weight and bias by ridge regression; returns R2 on the given pictures.

    Args:
        queries: `[N, D]`, each picture's query outputs averaged over the queries.
        captions: N captions.
        penalty: of the ridge, on centred data.
    """
    return fit_linear(model.projection, queries, content_embeddings(model, captions), penalty)


def content_embeddings(model: Stage2, captions: Sequence[str]) -> Tensor:
    """The weighted mean input embedding of each caption's content words: `[N, L]`, double precision.

    A word weighs the square of its inverse document frequency, log((N + 1) / captions that hold it): what sets a
    picture apart is to be heard beside what half of the others show too.
    """
    language, device = model.language, model.projection.weight.device
    embedding = language.llm.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    table = embedding.weight.detach()
    content = [content_words(caption) for caption in captions]
    held_by = Counter(word for words in content for word in set(words))
    vectors: dict[str, Tensor] = {}
    for word, count in held_by.items():
        ids = language.tokenizer(" " + word, add_special_tokens=False)["input_ids"]  # as within a text
        vector = table[torch.tensor(ids, device=device)].double().mean(0)
        vectors[word] = math.log((len(captions) + 1) / count) ** 2 * torch.cat([vector, vector.new_ones(1)])
    sums = torch.stack([torch.stack([vectors[word] for word in words]).sum(0) for words in content])
    return sums[:, :-1] / sums[:, -1:]


def content_words(caption: str) -> list[str]:
    """The words of a caption that are not `STOP_WORDS`; the whole caption where all are."""
    return [word for word in re.findall(r"\w+", caption.lower()) if word not in STOP_WORDS] or [caption]
