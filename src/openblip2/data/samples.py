"""The texts of images: the rows from which training draws batches.

A row is an image with a text that is drawn each time: one of its captions, or an answer to a question. `pictures` has
the number of each row's record.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from openblip2.data.records import Question, Record
from openblip2.data.text import clean_question

T = TypeVar("T")
NEAREST = 3  # number of similar rows from which one is drawn
MOST_TIMES = 10  # maximum number of times that balancing shows a question in an epoch
NEGATION = re.compile(r"\b(no|not|never|none)\b|n['\u2019]t\b", re.IGNORECASE)


class Captions:
    """One row for each image: one of its captions, with equal probability."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self.pictures = list(range(len(records)))

    def draw(self, rows: Sequence[int], generator: torch.Generator) -> tuple[list[str], None]:
        """The target texts of a batch, and None in place of questions."""
        return _draw([self.records[row].captions for row in rows], generator), None


class Answers:
    """One row for each question: one of the annotators' answers, drawn in proportion to its frequency (paper 4.3).

    Args:
        records: records with questions.
        balanced: ours: among yes/no questions with the same words, those with the rarer answer are repeated to be as
            frequent as the others, up to `MOST_TIMES` each per epoch. Otherwise a model learns from the words that "is
            there a red shape?" is mostly answered no. VQA v2 adds images for this.
    """

    def __init__(self, records: Sequence[Record], balanced: bool = False) -> None:
        asked = [(n, question) for n, record in enumerate(records) for question in record.questions]
        times = _times([question for _, question in asked]) if balanced else [1] * len(asked)
        self.asked = [one for one, count in zip(asked, times, strict=True) for _ in range(count)]
        self.pictures = [n for n, _ in self.asked]

    def draw(self, rows: Sequence[int], generator: torch.Generator) -> tuple[list[str], list[str]]:
        """The target texts of a batch, and the questions."""
        questions = [self.asked[row][1] for row in rows]
        texts = _draw([question.given for question in questions], generator)
        return texts, [clean_question(question.text) for question in questions]


class Instructions:
    """One row for each image: an instruction, with one of its captions or with the answer to one of its questions.

    All of these and the template are drawn for each sample. Differs from InstructBLIP (Dai et al. 2023, section 2.4),
    which draws each sample from one of many data sets, in proportion to the square root of their sizes.

    Args:
        records: records that each have a caption or a question.
        caption_templates: instructions that ask for a caption.
        question_templates: instructions with `{}` for the question.
        caption_share: share of captions in the samples of images that have both, in [0, 1].
    """

    def __init__(
        self,
        records: Sequence[Record],
        caption_templates: Sequence[str],
        question_templates: Sequence[str],
        caption_share: float,
    ) -> None:
        self.records, self.caption_share = records, caption_share
        self.caption_templates, self.question_templates = caption_templates, question_templates
        self.pictures = list(range(len(records)))

    def draw(self, rows: Sequence[int], generator: torch.Generator) -> tuple[list[str], list[str]]:
        """The target texts of a batch, and the whole instructions."""
        texts, instructions = [], []
        # Each row uses the same number of random draws, so that the choices for one row do not affect other rows.
        draws = torch.rand(len(rows), 4, generator=generator).tolist()
        for row, (kind, text, template, answer) in zip(rows, draws, strict=True):
            record = self.records[row]
            if record.captions and (kind < self.caption_share or not record.questions):
                texts.append(_pick(record.captions, text))
                instructions.append(_pick(self.caption_templates, template))
            else:
                question = _pick(record.questions, text)
                texts.append(_pick(question.given, answer))
                instructions.append(_pick(self.question_templates, template).replace("{}", question.text))
        return texts, instructions


Samples = Captions | Answers | Instructions


class SimilarRows:
    """Finds rows with similar captions, which become hard negatives of each other. Ours, not in the paper.

    The paper's batches of at least 1,680 pairs contain images that differ in one detail; small random batches rarely
    do, so neither ITC nor ITM has to learn details. GRIT-VLP (Byun et al. 2022) takes pairs that are similar for the
    model itself. Here, similarity is computed from words and pairs of adjacent words, so that a batch remains a
    function of seed and number. In half of the cases, rare words have a larger weight (TF-IDF): similar captions then
    name the same things, with other colours, places or numbers. In the other half, all words have the same weight, and
    similar captions name other things in the same form. Without these, ITM ignored nouns.

    Args:
        captions: one caption for each of R rows.
    """

    def __init__(self, captions: Sequence[str]) -> None:
        counts = [Counter([*words, *pairwise(words)]) for words in map(str.split, captions)]
        held_by = Counter(word for row in counts for word in row)
        rare = {word: math.log(len(counts) / n) for word, n in held_by.items()}
        self.vectors = [_unit_rows(counts, rare), _unit_rows(counts, dict.fromkeys(rare, 1.0))]
        first = {caption: row for row, caption in reversed([*enumerate(captions)])}
        self.texts = torch.tensor([first[caption] for caption in captions])  # [R], equal for the same caption

    def __call__(self, row: int, place: float) -> int:
        """One of the `NEAREST` rows with another caption, selected by `place` in [0, 1); any row if none is similar."""
        weighting, place = divmod(2 * place, 1)
        vectors = self.vectors[int(weighting)]
        scores = torch.mv(vectors, vectors[row].to_dense())
        scores[self.texts == self.texts[row]] = -1  # the same caption: positives, not negatives
        best, nearest = scores.topk(min(NEAREST, len(scores)))
        near = nearest[best > 0]
        return int(near[int(place * len(near))]) if len(near) else int(place * len(scores))


def _unit_rows(counts: Sequence[Counter], weights: Mapping[Any, float]) -> Tensor:
    """The counts as vectors of length 1: sparse, `[R, words]`; a row without any weight is 0."""
    columns = {word: column for column, word in enumerate(weights)}
    places = [(row, columns[word]) for row, words in enumerate(counts) for word in words]
    values = [[n * weights[word] for word, n in words.items()] for words in counts]
    lengths = [math.hypot(*row) or 1.0 for row in values]
    unit = torch.tensor([value / length for row, length in zip(values, lengths, strict=True) for value in row])
    shape = (len(counts), len(columns))
    return torch.sparse_coo_tensor(torch.tensor(places).T, unit, shape, check_invariants=True).coalesce()


def fewer_negations(records: Sequence[Record], share: float) -> list[Record]:
    """The records with only a `share` in [0, 1] of the questions that contain "not" or "no", selected evenly.

    Ours, for a first part of training (docs/decisions.md): if half of the questions are negated, a match of words and
    image means yes as often as no, so that no gradient teaches the model to look for matches.
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
    """How often to show each question so that yes and no are equally frequent, rounded."""
    cells = [(q.text, q.answer.strip().lower()) if q.kind == "yes/no" else None for q in questions]
    counts = Counter(cell for cell in cells if cell)
    most = {text: max(counts[text, "yes"], counts[text, "no"]) for text, _ in counts}
    return [min(MOST_TIMES, max(1, round(most[cell[0]] / counts[cell]))) if cell else 1 for cell in cells]


def _draw(choices: Sequence[Sequence[str]], generator: torch.Generator) -> list[str]:
    """One of each row's texts, with equal probability; a text that occurs twice is drawn twice as often."""
    places = torch.rand(len(choices), generator=generator).tolist()
    return [_pick(texts, place) for texts, place in zip(choices, places, strict=True)]


def _pick(choices: Sequence[T], place: float) -> T:
    """The element of `choices` at the relative position `place` in [0, 1)."""
    return choices[int(place * len(choices))]
