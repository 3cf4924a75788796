"""A closed-form start for the projection of stage 2. Ours, not the paper's; off unless `warm_start` is set.

From a random projection a language model learns to write captions long before it learns to look. Ridge regression
from the mean query output of stage 1 to the mean input embedding of the caption's content words puts the soft
prompt, before the first step, where the language model keeps the words of the picture.

Shapes: N pictures, Q queries, D Q-Former width, L LLM width.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from openblip2.model.stage2 import Stage2

# fmt: off
STOP_WORDS = frozenset((
    "a", "an", "the", "of", "on", "in", "at", "to", "by", "and", "or", "with", "is", "are", "was", "were",
    "be", "been", "being", "it", "its", "this", "that", "these", "those", "there", "here", "from", "for",
    "as", "into", "onto", "over",
))
# fmt: on


def warm_start(model: Stage2, queries: Tensor, captions: Sequence[str], penalty: float = 10.0) -> float:
    """Sets the projection's weight and bias by ridge regression; returns R2 on the given pictures.

    Args:
        model: whose Q-Former already holds the stage-1 weights.
        queries: `[N, D]`, each picture's query outputs averaged over the queries.
        captions: N captions. penalty: of the ridge, on centred data.
    """
    targets = content_embeddings(model, captions)
    sources = queries.double()
    mean_source, mean_target = sources.mean(0), targets.mean(0)
    x, y = sources - mean_source, targets - mean_target
    gram = x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weight = torch.linalg.solve(gram, x.T @ y)  # [D, L]
    model.projection.weight.data.copy_(weight.T)
    model.projection.bias.data.copy_(mean_target - mean_source @ weight)
    return float(1 - (y - x @ weight).square().sum() / y.square().sum())


def content_embeddings(model: Stage2, captions: Sequence[str]) -> Tensor:
    """The mean input embedding of each caption's content words: `[N, L]`, double precision."""
    language, device = model.language, model.projection.weight.device
    table = language.llm.get_input_embeddings()
    rows = []
    for caption in captions:
        words = [word for word in re.findall(r"\w+", caption.lower()) if word not in STOP_WORDS] or [caption]
        ids = language.tokenizer(" " + " ".join(words), add_special_tokens=False)["input_ids"]
        rows.append(table(torch.tensor(ids, device=device)).double().mean(0))
    return torch.stack(rows).detach()
