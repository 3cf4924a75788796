"""Closed-form initialisation of both stages. Not in the paper; off unless `warm_start` is set.

Stage 1: in a randomly initialised Q-Former, attention to the image is uniform, so all queries read the same mean patch,
and little of it reaches their outputs. Training solves the second problem but not the first: the queries remain one
pooled vector, which encodes the things and colours of a picture but not where each of them is. `place_queries` makes
each query attend to its own cell of a grid over the picture, `open_image_path` passes what it reads there to its
output, and `align_heads` solves for the two heads of ITC. By ridge regression, all information that a linear map can
extract is available before the first step. Only weights of the paper's model are set.

Stage 2: with a random projection, a language model learns to write captions long before it learns to use the image.
Ridge regression from the mean query output of stage 1 to the mean input embedding of the caption's content words, with
a higher weight for rare words, moves the soft prompt close to the picture's words before the first step.

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
from openblip2.model.qformer import Layer, QFormer
from openblip2.model.stage1 import Stage1
from openblip2.model.stage2 import Stage2
from openblip2.model.vision import RIDGE, fit_whitening

# Factor of FFN outputs, so that query rows keep their content in six layers; BERT's FFN was not trained on pictures.
FFN_SHARE = 0.3
# Factor of self-attention in stage 2: with 1 the alignment loss stays at 0.9, with 0.1 it falls (docs/decisions.md).
SELF_ATTENTION_SHARE = 0.1
# Number of pictures to which the patch positions and the whitening of patch features are fitted.
PICTURES = 128
# Attention logit of a query and a patch in its own cell, if the regression predicts both correctly.
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
    """Applies `open_image_path`, `place_queries`, then `align_heads`; returns R2 in the shared space."""
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
        queries.append(model.qformer.visual_tokens(patches).float().mean(1))
        ids, valid = (t.to(patches.device) for t in tokens(list(captions)))
        texts.append(model.qformer.text_pass(ids, valid).float())
    return align_heads(model, torch.cat(queries), torch.cat(texts))


def open_image_path(qformer: QFormer, patches: Tensor) -> None:
    """Makes cross-attention output the patches that it attends to: value = a rotated whitening, output = identity.

    Args:
        patches: `[N, P, V]`, after the Q-Former's image norm.
    """
    whitening = fit_whitening(patches)
    for layer in qformer.layers:
        assert isinstance(layer, Layer)
        if layer.cross is not None:
            # A different rotation for each layer, so that later layers do not overwrite what earlier ones have added.
            rotation = nn.init.orthogonal_(patches.new_empty(qformer.width, qformer.image_width))
            weight = rotation @ whitening.matrix  # symmetric: x @ matrix is matrix @ x
            layer.cross.value.weight.data.copy_(weight)
            layer.cross.value.bias.data.copy_(-weight @ whitening.mean)
            nn.init.eye_(layer.cross.out.weight)  # the attended values are added to the query's row unchanged
        layer.query_ffn.narrow.weight.data.mul_(FFN_SHARE)
        layer.query_ffn.narrow.bias.data.mul_(FFN_SHARE)


def place_queries(qformer: QFormer, patches: Tensor) -> None:
    """Makes each query attend to its own cell of a grid over the picture, in every head of every cross-attention.

    A linear map can predict the position of a patch from its feature, and the number of a query from its row. These
    two maps have Q outputs each and become the initial weights of the keys and of the queries, so that the logit of
    query n and a patch of cell n is large. Layers whose heads are narrower than Q are not changed.

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
                factor = (SHARPNESS * width**0.5) ** 0.5  # attention divides logits by the square root of the width
                which = ridge(asking.flatten(0, 1), own, penalty=10.0)  # row of a query -> its number
                for head in range(layer.cross.heads):
                    chosen = slice(head * width, head * width + count)
                    for linear, (weight, bias) in ((layer.cross.key, where), (layer.cross.query, which)):
                        linear.weight.data[chosen] = (factor * weight.T).to(linear.weight)
                        linear.bias.data[chosen] = (factor * bias).to(linear.bias)
            image = layer.cross.keys_values(patches)
        rows, _, _ = layer(rows, None, image, None, None)  # the next layer's input, with the new weights


def grid_cells(tokens: int, queries: int) -> Tensor:
    """Assigns each patch to the query that should read it: `[P, Q]`, with one 1 in each row.

    The last patch tokens are a square of side x side patches, row by row. Tokens before them, such as `[CLS]`, belong
    to no cell and have 1 / Q in each column.

    Args:
        tokens: P.
        queries: Q, the number of cells in a grid that is as nearly square as Q allows.
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

    The text head whitens: it maps the `[CLS]` outputs to their `E` directions of largest variance, each scaled to
    variance 1 (or less, for the narrowest). The image head is the ridge regression from the mean query output to this.

    Args:
        queries: `[N, D]`, each picture's query outputs averaged over the queries.
        texts: `[N, D]`, `[CLS]` outputs.
        penalty: ridge penalty as a number of pictures: it counts as much as the variance of that many pictures.
    """
    mean_text = texts.double().mean(0)
    centred = texts.double() - mean_text
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(texts))
    wanted = model.text_proj.out_features  # E
    whiten = (axes * (variances + RIDGE * variances.mean()).rsqrt())[:, -wanted:]  # the last have the largest variance
    whiten = F.pad(whiten, (0, wanted - whiten.shape[1]))  # [D, E], zero-padded if D < E
    set_linear(model.text_proj, whiten, -mean_text @ whiten)
    variance = float(queries.double().var(0, correction=0).mean())  # so that `penalty` is a number of pictures
    return fit_linear(model.vision_proj, queries, centred @ whiten, penalty * variance)


def fit_linear(layer: nn.Linear, x: Tensor, y: Tensor, penalty: float) -> float:
    """Sets a layer's weight and bias to the ridge regression `x [N, in]` -> `y [N, out]`; returns R2."""
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
    """Copies `weight [in, out]` and `bias [out]` into a layer."""
    layer.weight.data.copy_(weight.T)
    layer.bias.data.copy_(bias)


def warm_start_stage2(model: Stage2, pairs: Iterable[Pair]) -> float:
    """Applies `shrink_self_attention`, then fits the projection to the given pictures and captions; returns its R2."""
    # Other connectors have no self-attention from stage 1. First, because it changes the query outputs.
    if isinstance(model.connector, QFormer):
        shrink_self_attention(model.connector)
    queries, captions = [], []
    for patches, texts in pairs:
        queries.append(model.connector.visual_tokens(patches).float().mean(1))
        captions += texts
    return fit_linear(model.projection, torch.cat(queries), content_embeddings(model, captions), penalty=10.0)


def shrink_self_attention(qformer: QFormer) -> None:
    """Scales what self-attention adds to the queries by `SELF_ATTENTION_SHARE`.

    After stage 1, queries attend to each other nearly uniformly, so self-attention adds the same vector to all of them.
    This vector is larger than the row to which it is added, so each layer makes the queries more similar. In stage 2 no
    text shares these weights, and training can increase them again.
    """
    for layer in qformer.layers:
        assert isinstance(layer, Layer)
        layer.attention.out.weight.data.mul_(SELF_ATTENTION_SHARE)
        layer.attention.out.bias.data.mul_(SELF_ATTENTION_SHARE)


def content_embeddings(model: Stage2, captions: Sequence[str]) -> Tensor:
    """The weighted mean input embedding of each caption's content words: `[N, L]`, double precision.

    The weight of a word is the square of its inverse document frequency, log((N + 1) / captions that contain it), so
    that words that distinguish a picture count more than words that half of the captions share.
    """
    language, device = model.language, model.projection.weight.device
    embedding = language.llm.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    table = embedding.weight.detach()
    content = [content_words(caption) for caption in captions]
    held_by = Counter(word for words in content for word in set(words))
    vectors: dict[str, Tensor] = {}
    for word, count in held_by.items():
        ids = language.tokenizer(" " + word, add_special_tokens=False)["input_ids"]  # with a space, as within a text
        vector = table[torch.tensor(ids, device=device)].double().mean(0)
        vectors[word] = math.log((len(captions) + 1) / count) ** 2 * torch.cat([vector, vector.new_ones(1)])
    sums = torch.stack([torch.stack([vectors[word] for word in words]).sum(0) for words in content])
    return sums[:, :-1] / sums[:, -1:]


def content_words(caption: str) -> list[str]:
    """The words of a caption that are not `STOP_WORDS`; the whole caption if all are stop words."""
    return [word for word in re.findall(r"\w+", caption.lower()) if word not in STOP_WORDS] or [caption]
