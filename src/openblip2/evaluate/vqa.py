"""Visual question answering (paper, 4.1 and 4.3), scored as published results are: VQA accuracy, OK-VQA, GQA.

Every score is given per question, in [0, 1]. Sources: `VQAEval` of GT-Vision-Lab/VQA (2017-10, the last version) for
"official"; its older version in salesforce/LAVIS for "lavis", with which BLIP-2's published results were computed. The
rules are the same, including their peculiarities; the code is ours.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np

from openblip2.data.records import Question, Record
from openblip2.data.text import clean_answer
from openblip2.errors import UserError, require
from openblip2.evaluate.result import WITHHELD, Options, PartialTexts, Result, decoding_card
from openblip2.evaluate.validation import ARTICLES, baselines, exact_scores
from openblip2.inference.captioner import ANSWER, Captioner
from openblip2.progress import Progress

Protocol = Literal["official", "lavis"]

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
# The rules intend to delete periods that have no digit on either side. As implemented in the reference, they check only
# the next character, and they delete at most 32 periods.
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32
_NUMBERS = ("none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(max(0, value - 1)) for value, word in enumerate(_NUMBERS)}
# A word that lacks one apostrophe of these words is corrected to it.
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
} | {"somebody'd": "somebodyd"}  # this entry is also reversed in the reference's table


def vqa_normal(answer: str) -> str:
    """Normalises an answer by the VQA rules, so that it can be compared.

    Punctuation is removed, number words become digits, articles are removed, missing apostrophes are added; lower case,
    single spaces. Special cases that change scores: "none" is "0"; a hyphen becomes a space, but is deleted if a hyphen
    of the answer is beside a space or a number has a comma ("1,000-2,000" is "10002000"); a period is deleted unless a
    digit follows.
    """
    words = [_DIGITS.get(word, word) for word in _without_punctuation(clean_answer(answer)).lower().split()]
    return " ".join(_CORRECTED.get(word, word) for word in words if word not in ARTICLES)


def vqa_scores(answers: Sequence[str], questions: Sequence[Question], protocol: Protocol = "official") -> np.ndarray:
    """VQA accuracy of each answer, [n] in [0, 1]: min(annotators who gave it / 3, 1), averaged over leaving out one.

    In OK-VQA, each of the five answers counts twice; `Question.given` contains all ten. The formula also holds for 4 to
    9 answers; with 3 or fewer, even an answer that all annotators gave scores less than 1.

    Args:
        answers: the answers of the model.
        questions: questions with at least two answers each.
        protocol: how answers are compared. "official": after the VQA rules (`vqa_normal`); but if all annotators gave
            the same answer, only white space is changed, so "Yes" does not match "yes". "lavis": the model's answer is
            always normalised; in the annotators' answers, only punctuation is, and only if they differ. An answer that
            was given as "two", "the beach" or "Nike" then cannot be matched.

    Raises:
        UserError: a question has only one answer, so that no answer can be right.
    """
    return np.array([_vqa_score(a, q, protocol) for a, q in zip(answers, questions, strict=True)], dtype=np.float64)


def lemmas(answers: Sequence[str]) -> list[str]:
    """Lemmatises nouns and verbs of answers ("bananas" becomes "banana"), before any other rule is applied.

    It is used for OK-VQA, because its annotators' answers have this form; the other data sets are scored without it.
    Source: the authors' `_lemmatize`, also with spaCy's "en_core_web_sm".

    Raises:
        UserError: spaCy or its English model is not installed.
    """
    require("the lemmatiser of OK-VQA", "lemmas", "spacy")
    import spacy  # pyright: ignore[reportMissingImports]  (not among what the developers install)

    try:
        analyse = spacy.load("en_core_web_sm")
    except OSError as error:
        raise UserError("spaCy's English model is missing: python -m spacy download en_core_web_sm") from error
    return [" ".join(t.lemma_ if t.pos_ in ("NOUN", "VERB") else t.text for t in analyse(answer)) for answer in answers]


def _vqa_score(answer: str, question: Question, protocol: Protocol) -> float:
    given = list(question.given)
    if len(given) < 2:
        raise UserError(
            f"the question {question.text[:40]!r} has only one answer, but VQA accuracy needs at least two; "
            "give ten answers for each question, or use another score (exact match, GQA)"
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
    """Deletes a mark if one of its kind is beside a space or any number has a comma; else, it becomes a space."""
    all_go = _DIGIT_COMMA_DIGIT.search(answer) is not None
    marks = {mark: "" if all_go or f"{mark} " in answer or f" {mark}" in answer else " " for mark in _PUNCTUATION}
    return _PERIOD.sub("", answer.translate(str.maketrans(marks)), count=_MOST_PERIODS)


METRICS: dict[str, tuple[str, Callable[[Sequence[str], Sequence[Question]], np.ndarray]]] = {
    "vqa": ("VQA accuracy, the official normaliser", vqa_scores),
    "vqa-lavis": ("VQA accuracy, the normaliser of the authors' code (LAVIS)", partial(vqa_scores, protocol="lavis")),
    "gqa": ("exact match after the VQA rules, both sides", partial(exact_scores, normal=vqa_normal)),
    "exact": ("exact match, case, articles and punctuation aside", exact_scores),
}
USUAL = {"vqav2": "vqa", "okvqa": "vqa", "gqa": "gqa"}  # the official metric, by the kind of data
GROUP = 256  # questions that are answered and saved together


def score_answers(
    captioner: Captioner,
    records: Sequence[Record],
    options: Options,
    progress: Progress,
    partial_texts: PartialTexts,
    kind: str,
    known: Sequence[Record],
) -> Result:
    """Measures accuracy over all questions and for each kind; intervals are over images, not over questions.

    Args:
        records: images with questions; without answers if the split is withheld.
        partial_texts: stores the answers until they are scored.
        kind: the kind of data, for its official metric. Others: "vqa" if all questions have over 3 answers, or "exact".
        known: training images with questions, for the scores of guessers that see no image; () = not measured.

    Raises:
        UserError: VQA accuracy of a question with one answer; the lemmatiser is missing; or a question is not valid.
    """
    decoding = replace(ANSWER, beams=options.beams or ANSWER.beams)
    asked = [(n, question) for n, record in enumerate(records) for question in record.questions]
    owners, questions = [n for n, _ in asked], [question for _, question in asked]
    several = all(len(question.given) > 3 for question in questions)
    named, measure = METRICS[options.metric or USUAL.get(kind, "vqa" if several else "exact")]

    def generate(rows: slice) -> list[str]:
        prompts, read = captioner.read_questions([question.text for question in questions[rows]])
        return captioner.generate([records[n].image for n in owners[rows]], prompts, decoding, read)

    names, how = [(str(records[n].image), question.text) for n, question in asked], decoding_card(decoding)
    answers = partial_texts.texts("answers", "questions", names, GROUP, generate, progress, how)
    progress.doing("scoring")
    result = Result("vqa", len(records), options.seed)
    result.protocol |= decoding_card(decoding) | {
        "questions": len(questions),
        "prompt": captioner.settings.language.question,
        "metric": named,
        "lemmatised": options.lemmatised,
        "question_cleaning": "none"
        if captioner.settings.reads_prompts
        else "lower case, most punctuation that is not between digits removed, at most 50 words",
    }
    result.samples += [
        {"image": records[n].id, "question_id": question.id, "question": question.text, "answer": answer}
        for (n, question), answer in zip(asked, answers, strict=True)
    ]
    if not all(question.answer for question in questions):
        result.warnings.append(WITHHELD)
        return result
    judged = lemmas(answers) if options.lemmatised else answers
    scores = measure(judged, questions)
    result.add("accuracy", scores, groups=owners)
    for kind in sorted({question.kind for question in questions}):
        rows = [n for n, question in enumerate(questions) if question.kind == kind]
        result.add(f"accuracy, {kind}", scores[rows], groups=[owners[n] for n in rows])
    if known:
        result.beside["blind"] = baselines([question for record in known for question in record.questions], questions)
    for row, question, plain, score in zip(result.samples, questions, judged, scores.tolist(), strict=True):
        row |= {"judged_as": plain} if options.lemmatised else {}
        row |= {"given": list(question.given), "kind": question.kind, "score": score}
    return result
