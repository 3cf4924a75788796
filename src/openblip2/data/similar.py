"""Rows with similar captions, to be hard negatives of each other (`stage1.similar_start_step`). Ours, not the paper's.

The paper's batches of 1,680 pairs and more contain pictures that differ in one detail. A small batch of random pictures
hardly ever does, so neither ITC nor ITM has to learn details. GRIT-VLP (Byun et al. 2022) puts pairs into one batch
that the model itself finds similar. Here the words decide, so a batch stays a function of seed and number.

Shapes: R rows, W words and pairs of words.
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import torch

NEAREST = 3


class SimilarRows:
    """Finds rows with similar captions, by TF-IDF of words and pairs of neighbouring words.

    Args:
        captions: one for each row, `[R]`.
    """

    def __init__(self, captions: Sequence[str]) -> None:
        counts = [Counter([*words, *pairwise(words)]) for words in map(str.split, captions)]
        held_by = Counter(word for row in counts for word in row)
        columns = {word: column for column, word in enumerate(held_by)}
        weights = [{word: n * math.log(len(counts) / held_by[word]) for word, n in row.items()} for row in counts]
        lengths = [math.hypot(*row.values()) or 1.0 for row in weights]
        places = [(row, columns[word]) for row, words in enumerate(weights) for word in words]
        values = [weight / length for row, length in zip(weights, lengths, strict=True) for weight in row.values()]
        shape = (len(counts), len(columns))
        vectors = torch.sparse_coo_tensor(torch.tensor(places).T, values, shape, check_invariants=True)
        self.vectors = vectors.coalesce()  # [R, W], of length 1
        first = {caption: row for row, caption in reversed([*enumerate(captions)])}
        self.texts = torch.tensor([first[caption] for caption in captions])  # [R], equal for the same caption

    def __call__(self, row: int, place: float) -> int:
        """One of the `NEAREST` rows with another caption, the one at a place in [0, 1)."""
        scores = torch.mv(self.vectors, self.vectors[row].to_dense())
        scores[self.texts == self.texts[row]] = -1  # true pairs of this row's picture or caption
        nearest = scores.topk(min(NEAREST, len(scores))).indices
        return int(nearest[int(place * len(nearest))])
