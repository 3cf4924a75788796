"""Scores of visual question answering as the published figures count them: VQA accuracy, OK-VQA, GQA, exact match.

Every score is given per question, in [0, 1], and `summary` averages them, over all and for each kind of question.

Sources: `VQAEval` of GT-Vision-Lab/VQA (2017-10, the last) for "official"; its older state in salesforce/LAVIS for
"lavis", which BLIP-2's own figures were counted with. The rules are theirs, oddities included; the code is ours.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from openblip2.data.records import Question
from openblip2.errors import UserError
from openblip2.evaluate.vqa import normalise
from openblip2.model.extras import require

Protocol = Literal["official", "lavis"]

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
# The rules mean "neither side a digit"; as they are written, only what follows counts, and they stop at 32 periods.
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32
_NUMBERS = ("none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(max(0, value - 1)) for value, word in enumerate(_NUMBERS)}
_ARTICLES = ("a", "an", "the")
# What words are mended to that were written with an apostrophe too few.
_CONTRACTIONS = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd
it'll ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't should've shouldn't somebody'll
somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll
they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'd've y'all'll you'd've
"""
_MENDED = {
    word[:at] + word[at + 1 :]: word
    for word in _CONTRACTIONS.split()
    for at, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the wrong way round in the table, so here


def vqa_normal(answer: str) -> str:
    """An answer as the VQA rules compare it: punctuation, digits for number words, no articles, apostrophes; lower
    case, single spaces.

    Oddities of the rules that move scores: "none" is "0"; a hyphen is a space, but vanishes wherever one hyphen of
    the answer stands beside a space or a number has a comma ("1,000-2,000" is "10002000"); a period goes unless a
    digit follows.
    """
    return _words(_without_punctuation(_one_line(answer)))


def vqa_scores(answers: Sequence[str], questions: Sequence[Question], protocol: Protocol = "official") -> np.ndarray:
    """VQA accuracy of each answer, [n] in [0, 1]: min(people who said so / 3, 1), averaged over leaving out one person.

    Answers are compared after the VQA rules (`vqa_normal`), with one exception and one variant:

    - "official": nothing but white space is touched where all people gave the same answer, so that "Yes" fails there.
    - "lavis": the rules apply to the prediction always, and to people's answers in their punctuation alone, and that
      not where all are the same; an answer that people gave as "two", "the beach" or "Nike" cannot be hit.

    For OK-VQA, whose five answers count twice, `answers` of the question hold all ten. With 4 to 9 answers the same
    formula holds; with 3 or fewer not even the answer of all of them reaches 1.

    Raises:
        UserError: a question has one answer only, with which nothing can be right.
    """
    return np.array([_vqa_score(a, q, protocol) for a, q in zip(answers, questions, strict=True)], dtype=np.float64)


def gqa_scores(answers: Sequence[str], questions: Sequence[Question], lavis: bool = False) -> np.ndarray:
    """Whether each answer is the question's, [n] of 0 and 1, after the VQA rules on both sides.

    Args:
        lavis: leave the question's answer as it is, as the authors' code does: "t-shirt" cannot be hit then.
    """
    pairs = zip(answers, questions, strict=True)
    hits = [_normal_or_given(q.answer, lavis) == vqa_normal(answer) for answer, q in pairs]
    return np.array(hits, dtype=np.float64)


def exact_scores(answers: Sequence[str], questions: Sequence[Question]) -> np.ndarray:
    """Whether each answer is the question's, [n] of 0 and 1, case, articles and punctuation aside (`vqa.normalise`)."""
    hits = [normalise(answer) == normalise(q.answer) for answer, q in zip(answers, questions, strict=True)]
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


def lemmas(answers: Sequence[str], analyse: Callable[[str], Any] | None = None) -> list[str]:
    """Answers with their nouns and verbs in the dictionary form ("bananas" is "banana"), for OK-VQA, whose
    people's answers are given so; before any other rule.

    Source: the authors' `_lemmatize`. Opt-in: the other data sets are scored without.

    Args:
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
    answer = _one_line(answer)
    if protocol == "official":
        given = [_one_line(said) for said in given]
        if len(set(given)) > 1:
            given, answer = [vqa_normal(said) for said in given], vqa_normal(answer)
    else:
        answer = vqa_normal(answer)
        if len(set(given)) > 1:
            given = [_without_punctuation(said) for said in given]
    same, people = given.count(answer), len(given)
    return (same * min((same - 1) / 3, 1) + (people - same) * min(same / 3, 1)) / people


def _normal_or_given(answer: str, given: bool) -> str:
    return answer if given else vqa_normal(answer)


def _one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(answer: str) -> str:
    """Each mark removed where one of its kind stands beside a space, or any number has a comma; else made a space."""
    all_go = _DIGIT_COMMA_DIGIT.search(answer) is not None
    marks = {mark: "" if all_go or f"{mark} " in answer or f" {mark}" in answer else " " for mark in _PUNCTUATION}
    return _PERIOD.sub("", answer.translate(str.maketrans(marks)), count=_MOST_PERIODS)


def _words(answer: str) -> str:
    words = [_DIGITS.get(word, word) for word in answer.lower().split()]
    return " ".join(_MENDED.get(word, word) for word in words if word not in _ARTICLES)
