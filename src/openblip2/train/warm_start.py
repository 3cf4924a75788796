"""Closed-form starts of both stages. Ours, not the paper's; off unless `warm_start` is set.

Stage 1: a random Q-Former lets little of the picture through and scrambles that, and gradient steps find the large
directions (colour, layout) long before the small ones (which of hundreds of nouns). `open_image_path` lets the
whitened mean patch through to the query outputs; in every second layer `speak_as_text` makes of it what the caption's
rows look like there, so that the self-attention that queries and text share finds like beside like; `align_heads`
solves for the two heads of ITC. All by ridge regression: what a linear map can know of the pictures is known before
the first step.

Stage 2: from a random projection a language model learns to write captions long before it learns to look. Ridge
regression from the mean query output of stage 1 to the mean input embedding of the caption's content words, rare words
weighted up, puts the soft prompt, before the first step, where the language model keeps the words of the picture.

Shapes: N pictures, P patch tokens, V encoder width, Q queries, D Q-Former width, E shared space, L LLM width.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openblip2.data.tokens import QFormerTokens
from openblip2.model.qformer import Layer, QFormer, unimodal_mask
from openblip2.model.stage1 import Stage1
from openblip2.model.stage2 import Stage2
from openblip2.model.whitening import RIDGE, fit_whitening

# BERT's FFN was never trained on pictures: at this share of its output the query rows survive six of them.
FFN_SHARE = 0.3

# Features [B, P, V] on the model's device, and B captions.
Pair = tuple[Tensor, Sequence[str]]

# fmt: off
STOP_WORDS = frozenset((
    "a", "an", "the", "of", "on", "in", "at", "to", "by", "and", "or", "with", "is", "are", "was", "were",
    "be", "been", "being", "it", "its", "this", "that", "these", "those", "there", "here", "from", "for",
    "as", "into", "onto", "over",
))
# fmt: on


def warm_start_stage1(model: Stage1, tokens: QFormerTokens, pairs: Callable[[], Iterable[Pair]]) -> float:
    """`open_image_path`, `speak_as_text`, then `align_heads`, on the given pictures and captions.

    Returns:
        R2 in the shared space.
    """
    means, rows = [], []
    for patches, captions in pairs():
        means.append(model.qformer.image_norm(patches.float()).mean(1))
        ids, valid = (t.to(patches.device) for t in tokens(list(captions)))
        rows.append(mean_text_rows(model.qformer, ids, valid))
    open_image_path(model.qformer, torch.cat(means))
    speak_as_text(model.qformer, torch.cat(means), torch.cat(rows, dim=1))
    queries, texts = [], []
    for patches, captions in pairs():
        queries.append(mean_query_output(model.qformer, patches))
        ids, valid = (t.to(patches.device) for t in tokens(list(captions)))
        texts.append(model.qformer.text_pass(ids, valid).float())
    return align_heads(model, torch.cat(queries), torch.cat(texts))


def open_image_path(qformer: QFormer, means: Tensor) -> None:
    """Lets cross-attention hand on the whitened mean patch: value = a rotated whitening, output = identity.

    Args:
        means: `[N, V]`, each picture's patches after the Q-Former's image norm, averaged over the patches.
    """
    whitening = fit_whitening(means)
    for layer in qformer.layers:
        assert isinstance(layer, Layer)
        if layer.cross is not None:
            rotation = nn.init.orthogonal_(means.new_empty(qformer.width, qformer.image_width))
            weight = rotation @ whitening.matrix  # symmetric: x @ matrix is matrix @ x
            layer.cross.value.weight.data.copy_(weight)
            layer.cross.value.bias.data.copy_(-weight @ whitening.mean)
            nn.init.eye_(layer.cross.out.weight)
        layer.query_ffn.narrow.weight.data.mul_(FFN_SHARE)
        layer.query_ffn.narrow.bias.data.mul_(FFN_SHARE)


def mean_text_rows(qformer: QFormer, tokens: Tensor, valid: Tensor) -> Tensor:
    """Each text's mean row as it enters each layer, the text alone: `[B, T]` -> `[layers, B, D]`."""
    share = valid.float() / valid.float().sum(1, keepdim=True)
    text, found = qformer.embed_text(tokens), []
    for layer in qformer.layers:
        found.append((text.float() * share[..., None]).sum(1))
        _, text, _ = layer(None, text, None, unimodal_mask(0, valid), None)
    return torch.stack(found)


def speak_as_text(qformer: QFormer, means: Tensor, rows: Tensor, penalty: float = 30.0) -> None:
    """In every second layer that crosses, value = ridge regression from the whitened mean patch to the mean text row.

    The prediction is scaled to a variance of 1, as large as what the other layers hand on.

    Args:
        means: `[N, V]`, as for `open_image_path`, which comes first.
        rows: `[layers, N, D]`, of `mean_text_rows`.
        penalty: of the ridge, in pictures.
    """
    whitening = fit_whitening(means)
    seen = ((means - whitening.mean) @ whitening.matrix).double()
    gram = seen.T @ seen + penalty * torch.eye(seen.shape[1], dtype=seen.dtype, device=seen.device)
    crossing = [n for n, layer in enumerate(qformer.layers) if layer.cross is not None]
    for n in crossing[::2]:
        wanted = rows[n].double() - rows[n].double().mean(0)
        weight = torch.linalg.solve(gram, seen.T @ wanted)
        weight = (whitening.matrix.double() @ (weight / (seen @ weight).std())).to(means.dtype)  # [V, D]
        cross: Any = qformer.layers[n].cross
        set_linear(cross.value, weight, -whitening.mean @ weight)


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
    wanted = model.text_proj.out_features
    whiten = (axes * (variances + RIDGE * variances.mean()).rsqrt())[:, -wanted:]
    whiten = F.pad(whiten, (0, wanted - whiten.shape[1]))  # [D, E], zeros where the text is narrower than that
    set_linear(model.text_proj, whiten, -mean_text @ whiten)
    variance = float(queries.double().var(0, correction=0).mean())
    return fit_linear(model.vision_proj, queries, centred @ whiten, penalty * variance)


def fit_linear(layer: nn.Linear, x: Tensor, y: Tensor, penalty: float) -> float:
    """Ridge regression `x [N, in]` -> `y [N, out]` on centred data, as the layer's weight and bias; returns R2."""
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    gram = x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weight = torch.linalg.solve(gram, x.T @ y)
    set_linear(layer, weight, mean_y - mean_x @ weight)
    return float(1 - (y - x @ weight).square().sum() / y.square().sum())


def set_linear(layer: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    """`weight [in, out]`, `bias [out]`."""
    layer.weight.data.copy_(weight.T)
    layer.bias.data.copy_(bias)


def mean_query_output(qformer: QFormer, patches: Tensor) -> Tensor:
    """The query outputs of each picture, averaged over the queries: `[B, P, V]` -> `[B, D]`."""
    return qformer.query_output(patches).float().mean(1)


def warm_start_stage2(model: Stage2, pairs: Iterable[Pair]) -> float:
    """`align_projection` on the given pictures and captions; returns its R2. The Q-Former holds stage 1's weights."""
    queries, captions = [], []
    for patches, texts in pairs:
        queries.append(mean_query_output(model.qformer, patches))
        captions += texts
    return align_projection(model, torch.cat(queries), captions)


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
        ids = language.tokenizer(" " + word, add_special_tokens=False)["input_ids"]
        vector = table[torch.tensor(ids, device=device)].double().mean(0)
        vectors[word] = math.log((len(captions) + 1) / count) ** 2 * torch.cat([vector, vector.new_ones(1)])
    sums = torch.stack([torch.stack([vectors[word] for word in words]).sum(0) for words in content])
    return sums[:, :-1] / sums[:, -1:]


def content_words(caption: str) -> list[str]:
    """The words of a caption that are not `STOP_WORDS`; the whole caption where all are."""
    return [word for word in re.findall(r"\w+", caption.lower()) if word not in STOP_WORDS] or [caption]
