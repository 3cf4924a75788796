"""Rows with similar captions, to be hard negatives of each other (`data.similar_captions`). Ours, not the paper's.

In a small batch of random pictures hardly any two differ in one detail alone, so that neither ITC nor ITM has to learn
such details. GRIT-VLP (Byun et al. 2022) puts pairs into one batch that the model itself finds similar. Here words that
captions share decide, because they do not change in training: a batch stays a function of seed and number.
"""

from collections.abc import Iterable, Sequence

import torch

from openblip2.data.text import content_words


class SimilarRows:
    """Finds rows whose captions have two words in common.

    Args:
        captions: of each row.
    """

    def __init__(self, captions: Iterable[Sequence[str]]) -> None:
        self.words = [frozenset(word for text in texts for word in content_words(text)) for texts in captions]
        self.rows: dict[str, list[int]] = {}  # of each word
        for row, words in enumerate(self.words):
            for word in words:
                self.rows.setdefault(word, []).append(row)

    def __call__(self, row: int, generator: torch.Generator) -> int:
        """A random other row with two random words of this row's captions; any row if there is none.

        Not with as many words as possible: such negatives are too hard, and ITM learns less (docs/decisions.md).
        """
        words = sorted(self.words[row])
        chosen = {words[n] for n in torch.randperm(len(words), generator=generator)[:2].tolist()}
        rarer = min(chosen, key=lambda word: len(self.rows[word]))
        shared = [other for other in self.rows[rarer] if chosen <= self.words[other] and other != row]
        if not shared:
            return int(torch.randint(len(self.words), (), generator=generator))
        return shared[int(torch.randint(len(shared), (), generator=generator))]
