"""What is written about the pictures: the rows that training draws batches from.

A row is a picture with a text that may be drawn anew each time: one of its captions, or an answer to a question.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from openblip2.data.records import Record
from openblip2.data.text import clean_question


class Drawn(NamedTuple):
    """The texts of a batch: what is to be written, and what was asked, None where nothing was."""

    texts: list[str]
    questions: list[str] | None


class Captions:
    """One row for each picture: one of its captions, drawn evenly.

    Attributes:
        pictures: of each row, the number of its record. lengths: of each row's longest text, in words.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self.pictures = list(range(len(records)))
        self.lengths = [max(len(caption.split()) for caption in record.captions) for record in records]

    def draw(self, rows: Sequence[int], generator: torch.Generator) -> Drawn:
        return Drawn(_draw([self.records[row].captions for row in rows], generator), None)


class Answers:
    """One row for each question: one of the answers that annotators gave, drawn by how often it was given (paper 4.3).

    Attributes: as of `Captions`.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.asked = [(n, question) for n, record in enumerate(records) for question in record.questions]
        self.pictures = [n for n, _ in self.asked]
        self.lengths = [len(question.text.split()) for _, question in self.asked]

    def draw(self, rows: Sequence[int], generator: torch.Generator) -> Drawn:
        questions = [self.asked[row][1] for row in rows]
        texts = _draw([question.given for question in questions], generator)
        return Drawn(texts, [clean_question(question.text) for question in questions])


Samples = Captions | Answers


def _draw(choices: Sequence[Sequence[str]], generator: torch.Generator) -> list[str]:
    """One of each row's texts, drawn evenly: a text that stands there twice is drawn twice as often."""
    places = torch.rand(len(choices), generator=generator).tolist()
    return [texts[int(place * len(texts))] for texts, place in zip(choices, places, strict=True)]
