"""What is written about the pictures: the rows that training draws batches from.

A row is a picture with a text that may be drawn anew each time: one of its captions, or an answer to a question.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from openblip2.data.records import Question, Record
from openblip2.data.text import clean_question

MOST_TIMES = 10  # that balancing shows one question in an epoch
NEGATION = re.compile(r"\b(no|not|never|none)\b|n['\u2019]t\b", re.IGNORECASE)


class Drawn(NamedTuple):
    """The texts of a batch: what is to be written, and what was asked, None where nothing was."""

    texts: list[str]
    questions: list[str] | None


class Captions:
    """One row for each picture: one of its captions, drawn evenly.

    Attributes:
        pictures: of each row, the number of its record.
        lengths: of each row's longest text, in words.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self.pictures = list(range(len(records)))
        self.lengths = [max(len(caption.split()) for caption in record.captions) for record in records]

    def draw(self, rows: Sequence[int], generator: torch.Generator) -> Drawn:
        return Drawn(_draw([self.records[row].captions for row in rows], generator), None)


class Answers:
    """One row for each question: one of the answers that annotators gave, drawn by how often it was given (paper 4.3).

    `balanced`: of yes/no questions in the same words, those with the rarer answer are shown as often as the others,
    each up to `MOST_TIMES` in an epoch. "Is there a red shape?" is mostly to be answered with no, and a model that has
    learned so much from the words alone has little reason left to look. Ours; VQA v2 adds pictures to the same end.

    Attributes: as of `Captions`.
    """

    def __init__(self, records: Sequence[Record], balanced: bool = False) -> None:
        asked = [(n, question) for n, record in enumerate(records) for question in record.questions]
        times = _times([question for _, question in asked]) if balanced else [1] * len(asked)
        self.asked = [one for one, count in zip(asked, times, strict=True) for _ in range(count)]
        self.pictures = [n for n, _ in self.asked]
        self.lengths = [len(question.text.split()) for _, question in self.asked]

    def draw(self, rows: Sequence[int], generator: torch.Generator) -> Drawn:
        questions = [self.asked[row][1] for row in rows]
        texts = _draw([question.given for question in questions], generator)
        return Drawn(texts, [clean_question(question.text) for question in questions])


Samples = Captions | Answers


def fewer_negations(records: Sequence[Record], share: float) -> list[Record]:
    """The records with no more than `share` in [0, 1] of the questions that are asked with "not" or "no", evenly taken.

    A first course for a model that is to compare. Where half of the questions are turned round, a match of words and
    picture means yes as often as no, and nothing pulls the Q-Former to look for one. Ours (docs/decisions.md).
    """
    met = 0

    def is_kept(question: Question) -> bool:
        nonlocal met
        if not NEGATION.search(question.text):
            return True
        met += 1
        return int(met * share) > int((met - 1) * share)

    return [replace(r, questions=tuple(q for q in r.questions if is_kept(q))) for r in records]


def _times(questions: Sequence[Question]) -> list[int]:
    """How often each question is to be shown for yes and no to come equally often, to the nearest whole number."""
    cells = [(q.text, q.answer.strip().lower()) if q.kind == "yes/no" else None for q in questions]
    counts = Counter(cell for cell in cells if cell)
    most = {text: max(counts[text, "yes"], counts[text, "no"]) for text, _ in counts}
    return [min(MOST_TIMES, max(1, round(most[cell[0]] / counts[cell]))) if cell else 1 for cell in cells]


def _draw(choices: Sequence[Sequence[str]], generator: torch.Generator) -> list[str]:
    """One of each row's texts, drawn evenly: a text that stands there twice is drawn twice as often."""
    places = torch.rand(len(choices), generator=generator).tolist()
    return [texts[int(place * len(texts))] for texts, place in zip(choices, places, strict=True)]
