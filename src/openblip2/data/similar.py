"""Rows with similar captions, to be hard negatives of each other (`data.similar_captions`). Ours, not the paper's.

In a small batch of random pictures hardly any two differ in one detail alone, so that neither ITC nor ITM has to learn
such details. GRIT-VLP (Byun et al. 2022) puts pairs into one batch that the model itself finds similar. Here words that
captions share decide, because they do not change in training: a batch stays a function of seed and number.

Shapes: R rows.
"""

from collections.abc import Iterable, Sequence
from functools import reduce

import numpy as np
import torch

from openblip2.data.text import content_words

SHARED_WORDS = 2


class SimilarRows:
    """Finds rows whose captions have words in common.

    Args:
        captions: of each row, `[R]`.
    """

    def __init__(self, captions: Iterable[Sequence[str]]) -> None:
        self.words = [sorted({word for text in texts for word in content_words(text)}) for texts in captions]
        rows: dict[str, list[int]] = {}
        for row, words in enumerate(self.words):
            for word in words:
                rows.setdefault(word, []).append(row)
        self.rows = {word: np.array(of_word) for word, of_word in rows.items()}

    def __call__(self, row: int, generator: torch.Generator) -> int:
        """A random other row with two random words of this row's captions; any row if there is none.

        Not the most similar row: it would mostly be of the same things, and things would not be told apart any more.
        """
        chosen = torch.randperm(len(self.words[row]), generator=generator)[:SHARED_WORDS].tolist()
        of_words = [self.rows[self.words[row][n]] for n in chosen]
        shared = reduce(lambda some, more: np.intersect1d(some, more, assume_unique=True), of_words)
        others = shared[shared != row]
        if not len(others):
            return int(torch.randint(len(self.words), (), generator=generator))
        return int(others[int(torch.randint(len(others), (), generator=generator))])
