"""Scores of visual question answering as published results compute them: VQA accuracy, OK-VQA, GQA, exact match.

Every score is given per question, in [0, 1]; `summary` averages them over all questions and for each kind of question.

Sources: `VQAEval` of GT-Vision-Lab/VQA (2017-10, the last version) for "official"; its older version in
salesforce/LAVIS for "lavis", with which BLIP-2's published results were computed. The rules are theirs, with all that
is odd about them; the code is ours.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from openblip2.data.records import Question
from openblip2.data.text import clean_answer
from openblip2.errors import UserError, require

Protocol = Literal["official", "lavis"]

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
# The rules mean that no digit is on either side; as they are written, only what follows counts, and they stop at 32
# periods.
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32
_NUMBERS = ("none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(max(0, value - 1)) for value, word in enumerate(_NUMBERS)}
_ARTICLES = ("a", "an", "the")
# Words with one apostrophe left out are corrected to these.
_CONTRACTIONS = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd
it'll ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't should've shouldn't somebody'll
somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll
they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'd've y'all'll you'd've
"""
_CORRECTED = {
    word[:at] + word[at + 1 :]: word
    for word in _CONTRACTIONS.split()
    for at, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the wrong way round in the reference's table, too


def normalise(answer: str) -> str:
    """Lower case, without articles, punctuation and repeated spaces: how "exact" compares answers."""
    plain = re.sub(r"[^\w\s]", " ", answer.lower())
    return " ".join(word for word in plain.split() if word not in _ARTICLES)


def vqa_normal(answer: str) -> str:
    """An answer as the VQA rules compare it: punctuation, digits for number words, no articles, apostrophes; lower
    case, single spaces.

    Special cases that change scores: "none" is "0"; a hyphen becomes a space, but is deleted if one hyphen of the
    answer is beside a space or a number has a comma ("1,000-2,000" is "10002000"); a period is deleted unless a digit
    follows.
    """
    return _words(_without_punctuation(clean_answer(answer)))


def vqa_scores(answers: Sequence[str], questions: Sequence[Question], protocol: Protocol = "official") -> np.ndarray:
    """VQA accuracy of each answer, [n] in [0, 1]: min(annotators who gave it / 3, 1), averaged over leaving out one.

    For OK-VQA, whose five answers count twice, `Question.given` holds all ten. The formula also holds for 4 to 9
    answers; with 3 or fewer, even the answer of all annotators scores less than 1.

    Args:
        answers: of the model.
        questions: with at least two answers each.
        protocol: how answers are compared. "official": after the VQA rules (`vqa_normal`); only white space is changed
            if all annotators gave the same answer, so that "Yes" fails there. "lavis": the rules are always applied to
            the model's answer, and to the annotators' answers only those for punctuation, and only if they differ; an
            answer that was given as "two", "the beach" or "Nike" cannot be matched.

    Raises:
        UserError: a question has only one answer, so that nothing can be right.
    """
    return np.array([_vqa_score(a, q, protocol) for a, q in zip(answers, questions, strict=True)], dtype=np.float64)


def exact_scores(
    answers: Sequence[str], questions: Sequence[Question], normal: Callable[[str], str] = normalise
) -> np.ndarray:
    """Whether each answer equals the question's answer, [n] of 0 and 1, both after `normal`: `vqa_normal` for GQA."""
    hits = [normal(answer) == normal(q.answer) for answer, q in zip(answers, questions, strict=True)]
    return np.array(hits, dtype=np.float64)


def summary(scores: np.ndarray, questions: Sequence[Question]) -> dict[str, Any]:
    """Mean score in [0, 1] over all questions, and for each kind apart: `{"n", "accuracy", kind: {...}}`."""
    assert len(scores) == len(questions)
    kinds = np.array([question.kind for question in questions])
    found: dict[str, Any] = {"n": len(scores), "accuracy": float(np.mean(scores))}
    for kind in sorted(set(kinds.tolist())):
        part = scores[kinds == kind]
        found[kind] = {"n": len(part), "accuracy": float(part.mean())}
    return found


def accuracy(answers: Sequence[str], questions: Sequence[Question]) -> dict[str, Any]:
    """`summary` of `exact_scores`."""
    return summary(exact_scores(answers, questions), questions)


def baselines(known: Sequence[Question], asked: Sequence[Question]) -> dict[str, Any]:
    """The accuracy on `asked` of two guessers that see no image and know the training questions `known`.

    majority: always the most common answer. question_only: the most common answer to the same question, or the
    majority's if the question is new.
    """
    usual = Counter(q.answer for q in known).most_common(1)[0][0]
    by_text: dict[str, Counter[str]] = {}
    for question in known:
        by_text.setdefault(question.text, Counter())[question.answer] += 1
    guesses = [by_text[q.text].most_common(1)[0][0] if q.text in by_text else usual for q in asked]
    return {"majority": accuracy([usual] * len(asked), asked), "question_only": accuracy(guesses, asked)}


def lemmas(answers: Sequence[str], analyse: Callable[[str], Any] | None = None) -> list[str]:
    """Answers with nouns and verbs in their dictionary form ("bananas" is "banana"), before any other rule.

    For OK-VQA, whose annotators' answers are given in this form; the other data sets are scored without. Source: the
    authors' `_lemmatize`.

    Args:
        answers: of the model.
        analyse: a spaCy pipeline with tagger and lemmatiser; None = spaCy's "en_core_web_sm", as the authors do.

    Raises:
        UserError: spaCy or its English model is not installed.
    """
    analyse = analyse or _spacy_english()
    return [" ".join(t.lemma_ if t.pos_ in ("NOUN", "VERB") else t.text for t in analyse(answer)) for answer in answers]


def _spacy_english() -> Callable[[str], Any]:
    require("the lemmatiser of OK-VQA", "lemmas", "spacy")
    import spacy  # pyright: ignore[reportMissingImports]  (not among what the developers install)

    try:
        return spacy.load("en_core_web_sm")
    except OSError as error:
        raise UserError("spaCy's English model is missing: python -m spacy download en_core_web_sm") from error


def _vqa_score(answer: str, question: Question, protocol: Protocol) -> float:
    given = list(question.given)
    if len(given) < 2:
        raise UserError(
            f"the question {question.text[:40]!r} has one person's answer and VQA accuracy leaves one out; "
            "ten answers each, or another score (exact match, GQA)"
        )
    answer = clean_answer(answer)
    if protocol == "official":
        given = [clean_answer(said) for said in given]
        if len(set(given)) > 1:
            given, answer = [vqa_normal(said) for said in given], vqa_normal(answer)
    else:
        answer = vqa_normal(answer)
        if len(set(given)) > 1:
            given = [_without_punctuation(said) for said in given]
    same, people = given.count(answer), len(given)
    return (same * min((same - 1) / 3, 1) + (people - same) * min(same / 3, 1)) / people


def _without_punctuation(answer: str) -> str:
    """Each mark is deleted if one of its kind is beside a space or any number has a comma, else it becomes a space."""
    all_go = _DIGIT_COMMA_DIGIT.search(answer) is not None
    marks = {mark: "" if all_go or f"{mark} " in answer or f" {mark}" in answer else " " for mark in _PUNCTUATION}
    return _PERIOD.sub("", answer.translate(str.maketrans(marks)), count=_MOST_PERIODS)


def _words(answer: str) -> str:
    words = [_DIGITS.get(word, word) for word in answer.lower().split()]
    return " ".join(_CORRECTED.get(word, word) for word in words if word not in _ARTICLES)
