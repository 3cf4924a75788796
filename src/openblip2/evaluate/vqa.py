"""Visual question answering: exact match after normalisation, beside what can be had without looking."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from openblip2.data.records import Question

ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(answer: str) -> str:
    """Lower case, without articles, punctuation and doubled spaces."""
    plain = re.sub(r"[^\w\s]", " ", answer.lower())
    return " ".join(ARTICLES.sub(" ", plain).split())


def accuracy(answers: Sequence[str], questions: Sequence[Question]) -> dict[str, Any]:
    """Share of answers that match exactly: over all questions, and for each kind of question apart."""
    hits = [normalise(a) == normalise(q.answer) for a, q in zip(answers, questions, strict=True)]
    found: dict[str, Any] = {"n": len(hits), "accuracy": sum(hits) / len(hits)}
    for kind in sorted({q.kind for q in questions}):
        part = [hit for hit, q in zip(hits, questions, strict=True) if q.kind == kind]
        found[kind] = {"n": len(part), "accuracy": sum(part) / len(part)}
    return found


def baselines(known: Sequence[Question], asked: Sequence[Question]) -> dict[str, Any]:
    """What two blind guessers score on `asked`, having read all of `known` (the training questions).

    majority: the most common answer, always. question_only: the most common answer to the very same question, or
    the majority's where the question is new.
    """
    usual = Counter(q.answer for q in known).most_common(1)[0][0]
    by_text: dict[str, Counter[str]] = {}
    for question in known:
        by_text.setdefault(question.text, Counter())[question.answer] += 1
    guesses = [by_text[q.text].most_common(1)[0][0] if q.text in by_text else usual for q in asked]
    return {"majority": accuracy([usual] * len(asked), asked), "question_only": accuracy(guesses, asked)}
