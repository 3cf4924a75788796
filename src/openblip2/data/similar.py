"""Rows with similar captions, to be hard negatives of each other (`data.similar_captions`). Ours, not the paper's.

In a small batch of random pictures hardly any two differ in one detail alone, so that neither ITC nor ITM has to learn
such details. GRIT-VLP (Byun et al. 2022) puts pairs into one batch that the model itself finds similar. Here words that
captions share decide, because they do not change in training: a batch stays a function of seed and number.
"""

from collections.abc import Iterable, Sequence

import torch

from openblip2.data.text import content_words


class SimilarRows:
    """Finds rows whose captions have many words in common.

    Args:
        captions: of each row.
    """

    def __init__(self, captions: Iterable[Sequence[str]]) -> None:
        self.captions = [tuple(texts) for texts in captions]
        self.words = [frozenset(word for text in texts for word in content_words(text)) for texts in self.captions]
        self.rows: dict[str, list[int]] = {}  # of each word
        for row, words in enumerate(self.words):
            for word in words:
                self.rows.setdefault(word, []).append(row)

    def __call__(self, row: int, generator: torch.Generator) -> int:
        """A random row with other captions that share most words with this row's; any row if none shares a word.

        Words are taken in random order, and each that some row shares, too, is kept. So what differs in the end is
        anything, the thing as often as its colour or its place. The nearest row by frequencies of words would mostly
        be about the same things, which are rare words, and things would not be told apart any more.
        """
        words, found = sorted(self.words[row]), list[int]()
        for n in torch.randperm(len(words), generator=generator).tolist():
            candidates = found or self.rows[words[n]]
            shared = (one for one in candidates if words[n] in self.words[one])
            found = [one for one in shared if self.captions[one] != self.captions[row]] or found
        if not found:
            return int(torch.randint(len(self.words), (), generator=generator))
        return found[int(torch.randint(len(found), (), generator=generator))]
